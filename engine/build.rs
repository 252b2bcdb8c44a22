//! Compiles the one call that libgomp lacks, for the worker.

fn main() {
    println!("cargo::rerun-if-changed=src/worker/spin.c");
    #[cfg(feature = "worker")]
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        cc::Build::new()
            .file("src/worker/spin.c")
            .warnings_into_errors(true)
            .compile("karez_spin");
    }
}
