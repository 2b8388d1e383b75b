//! The terminal: standard input and output, numbers and progress for people, and the signals that stop a command.

pub(crate) mod input;
pub(crate) mod output;
pub(crate) mod stop;
