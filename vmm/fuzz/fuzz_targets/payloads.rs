#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| vmm_fuzz::payloads(bytes));
