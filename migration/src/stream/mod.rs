//! The stream of records.

pub(crate) mod bytes_field;
