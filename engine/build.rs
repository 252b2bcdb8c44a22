//! Compiles, for the worker, the one call that libgomp lacks, and llama.cpp's arithmetic once for each instruction set.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src/worker/spin.c");
    println!("cargo::rustc-check-cfg=cfg(karez_serves_all)");
    println!(
        "cargo::rustc-check-cfg=cfg(karez_level, values(\"v2\", \"v2_avx\", \"v3\", \"v3_vnni\", \"v4\", \"v4_vnni\", \
         \"v4_bf16\"))"
    );
    #[cfg(feature = "worker")]
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        cc::Build::new()
            .file("src/worker/spin.c")
            .warnings_into_errors(true)
            .compile("karez_spin");
        if std::env::var("CARGO_CFG_TARGET_ARCH").as_deref() == Ok("x86_64") {
            levels::compile();
        }
    }
}

/// One binary for every x86-64 processor.
///
/// llama-cpp-sys compiles llama.cpp's CPU back end for the oldest of them. Here the same sources are compiled again for each
/// level below, and all that a level defines is then made private to it, but for one entrance: no function of llama.cpp or of
/// the C++ library that was compiled for a newer processor can be linked into what runs on an older one.
#[cfg(feature = "worker")]
mod levels {
    use std::{
        env, fs,
        path::{Path, PathBuf},
        process::Command,
    };

    const V2: &[&str] = &["-msse4.2", "-mpopcnt"];
    const AVX: &[&str] = &["-mavx"];
    const V3: &[&str] = &["-mavx2", "-mfma", "-mf16c", "-mbmi2"];
    const V4: &[&str] = &[
        "-mavx512f",
        "-mavx512cd",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512bw",
    ];

    /// Name and flags; `level` in the library knows which processors have what.
    const LEVELS: [(&str, &[&[&str]]); 7] = [
        ("v2", &[V2]),
        ("v2_avx", &[V2, AVX]),
        ("v3", &[V2, AVX, V3]),
        ("v3_vnni", &[V2, AVX, V3, &["-mavxvnni"]]),
        ("v4", &[V2, AVX, V3, V4]),
        ("v4_vnni", &[V2, AVX, V3, V4, &["-mavx512vnni"]]),
        ("v4_bf16", &[V2, AVX, V3, V4, &["-mavx512vnni", "-mavx512bf16"]]),
    ];

    pub(crate) fn compile() {
        let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo names a folder"));
        let ggml = sources().join("ggml");
        let (c, cpp) = files(&ggml.join("src/ggml-cpu"));
        let mut all = cc::Build::new();
        for (name, flags) in LEVELS {
            let dir = out.join(name);
            fs::create_dir_all(&dir).expect("the build folder can be written");
            let flags: Vec<&str> = flags.iter().copied().flatten().copied().collect();
            let known = |flag: &&str| {
                cc::Build::new()
                    .cpp(true)
                    .is_flag_supported(flag)
                    .unwrap_or(false)
            };
            if let Some(flag) = flags.iter().find(|flag| !known(flag)) {
                println!(
                    "cargo::warning=this C++ compiler knows no {flag}: processors that have it use the next level"
                );
                continue;
            }
            println!("cargo::rustc-cfg=karez_level=\"{name}\"");
            // This script runs again when llama.cpp was built again, with whatever settings: that changes nothing here.
            let (made, stamp) = (dir.join(format!("level_{name}.o")), dir.join("made-of"));
            let made_of = format!("{}\n{flags:?}\n{}", ggml.display(), include_str!("build.rs"));
            if made.exists() && fs::read_to_string(&stamp).is_ok_and(|known| known == made_of) {
                all.object(made);
                continue;
            }
            let mut objects = build(&ggml, &dir, &flags)
                .files(&c)
                .std("gnu11")
                .compile_intermediates();
            let cpps = build(&ggml, &dir, &flags)
                .cpp(true)
                .files(&cpp)
                .std("gnu++17")
                .compile_intermediates();
            objects.extend(cpps);
            close(&dir, name, &objects, &made);
            fs::write(stamp, made_of).expect("the build folder can be written");
            all.object(made);
        }
        all.compile("karez_levels");
    }

    /// The folder of llama.cpp that llama-cpp-sys was built from: CMake wrote it down.
    fn sources() -> PathBuf {
        const TOLD: &str = "DEP_LLAMA_GGML_CMAKE_DIR";
        println!("cargo::rerun-if-env-changed={TOLD}");
        let told = env::var_os(TOLD).expect("llama-cpp-sys tells where it was built");
        let mut above = Path::new(&told).ancestors();
        let cache = above.find_map(|dir| fs::read_to_string(dir.join("build/CMakeCache.txt")).ok());
        let cache = cache.expect("CMake's cache lies beside what it built");
        if cache.lines().any(|line| line == "GGML_AVX2:BOOL=ON") {
            println!(
                "cargo::warning=llama.cpp was configured for processors with AVX2 and no others in this build folder: \
                 `cargo clean -p llama-cpp-sys-2`, and the same with --release, builds it for all"
            );
        } else {
            println!("cargo::rustc-cfg=karez_serves_all");
        }
        let home = cache
            .lines()
            .find_map(|line| line.strip_prefix("CMAKE_HOME_DIRECTORY:INTERNAL="));
        PathBuf::from(home.expect("CMake's cache names its sources"))
    }

    /// The sources of the back end, in C and in C++.
    fn files(dir: &Path) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let (mut c, mut cpp) = (Vec::new(), Vec::new());
        for folder in ["", "amx", "tiled", "llamafile", "arch/x86"] {
            let Ok(entries) = fs::read_dir(dir.join(folder)) else {
                continue;
            };
            for path in entries.flatten().map(|entry| entry.path()) {
                match path.extension().and_then(|ending| ending.to_str()) {
                    Some("c") => c.push(path),
                    // Only asked by back ends that lie in files of their own.
                    Some("cpp") if !path.ends_with("cpu-feats.cpp") => cpp.push(path),
                    _ => {}
                }
            }
        }
        c.sort();
        cpp.sort();
        let dir = dir.display();
        assert!(
            c.len() >= 3 && cpp.len() >= 8,
            "llama.cpp's CPU back end is not in {dir}"
        );
        (c, cpp)
    }

    /// As llama.cpp's own build does it, optimised whatever the profile.
    fn build(ggml: &Path, dir: &Path, flags: &[&str]) -> cc::Build {
        let mut build = cc::Build::new();
        build
            .out_dir(dir)
            .opt_level(3)
            .debug(false)
            .warnings(false)
            .pic(true)
            // A unique symbol cannot be made private.
            .flag_if_supported("-fno-gnu-unique")
            .flag("-fopenmp")
            .define("NDEBUG", None)
            .define("_GNU_SOURCE", None)
            .define("_XOPEN_SOURCE", "600")
            .define("GGML_SCHED_MAX_COPIES", "4")
            .define("GGML_USE_OPENMP", None)
            .define("GGML_USE_LLAMAFILE", None)
            .define("GGML_USE_CPU_REPACK", None)
            .include(ggml.join("include"))
            .include(ggml.join("src"))
            .include(ggml.join("src/ggml-cpu"));
        for flag in flags {
            build.flag(flag);
        }
        build
    }

    /// Makes one object of a level, of which nothing but its entrance can be seen.
    fn close(dir: &Path, name: &str, objects: &[PathBuf], closed: &Path) {
        let joined = dir.join("joined.o");
        let mut link = Command::new(cc::Build::new().cpp(true).get_compiler().path());
        link.args(["-r", "-nostdlib", "-Wl,--force-group-allocation", "-o"])
            .arg(&joined)
            .args(objects);
        run(
            link,
            "a linker with --force-group-allocation is needed: binutils 2.29 or newer",
        );
        let mut hide = Command::new(env::var_os("OBJCOPY").unwrap_or_else(|| "objcopy".into()));
        let entrance = format!("karez_level_{name}");
        hide.arg(format!("--redefine-sym=ggml_backend_cpu_reg={entrance}"))
            .arg(format!("--keep-global-symbol={entrance}"))
            .arg(&joined)
            .arg(closed);
        run(hide, "install binutils, or name an objcopy in OBJCOPY");
        for used in objects.iter().chain([&joined]) {
            let _ = fs::remove_file(used);
        }
    }

    fn run(mut command: Command, needs: &str) {
        match command.status() {
            Ok(status) if status.success() => {}
            Ok(status) => panic!("{command:?}: {status}; {needs}"),
            Err(error) => panic!("{command:?}: {error}; {needs}"),
        }
    }
}
