#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| migration_fuzz::source(bytes));
