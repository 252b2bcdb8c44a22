//! A worker process and nothing else: what this crate's tests start. Users have the same behind `karez worker`.
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some("--check-isolation") {
        let Ok(program) = std::env::current_exe() else {
            return ExitCode::FAILURE;
        };
        print!("{}", karez_engine::worker::check_isolation(&program));
        return ExitCode::SUCCESS;
    }
    karez_engine::worker::main()
}
