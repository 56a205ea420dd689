//! The program `boxlitefs`. Its command line is in [`boxlitefs::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    boxlitefs::cli::run()
}
