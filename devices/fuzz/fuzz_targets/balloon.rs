#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| devices_fuzz::balloon(bytes));
