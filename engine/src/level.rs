//! The instruction set that llama.cpp computes with: the best that this processor has.
//!
//! The binary holds llama.cpp's CPU back end for the oldest processors of its architecture and, on x86-64, once more for each
//! level of [`LEVELS`]; the build script says how. [`choose`] puts one of them in the place of the first, before a model is
//! loaded. Equal scores to the last bit are to be had within a level only.
use crate::error::EngineError;

/// Names a level to be used instead of the best one: to compare, or to look for a fault.
pub const WISH: &str = "KAREZ_CPU_LEVEL";

/// The level that this process computes with, chosen at the first call.
pub fn choose() -> Result<&'static str, EngineError> {
    static CHOSEN: std::sync::OnceLock<Result<&str, EngineError>> = std::sync::OnceLock::new();
    let wish = std::env::var(WISH).ok().filter(|wish| !wish.is_empty());
    CHOSEN.get_or_init(|| place(wish.as_deref())).clone()
}

/// Whether this build begins with the oldest processors: a GGML_ variable of the builder's can say otherwise.
pub const SERVES_ALL: bool = cfg!(karez_serves_all);

/// The levels that this processor can compute with, best first.
pub fn usable() -> Vec<&'static str> {
    let levels = LEVELS.iter().filter(|level| (level.fits)());
    levels.map(|level| level.name).chain([BASE]).collect()
}

fn place(wish: Option<&str>) -> Result<&'static str, EngineError> {
    let name = match (wish, usable()) {
        (None, usable) => usable[0],
        (Some(wish), usable) => match usable.iter().find(|name| **name == wish) {
            Some(name) => name,
            None => {
                return Err(EngineError::Unsupported {
                    reason: format!("{WISH} is {wish:?}: here it may be {}", usable.join(", ")),
                });
            }
        },
    };
    let Some(level) = LEVELS.iter().find(|level| level.name == name) else {
        if cfg!(target_arch = "x86_64") {
            eprintln!(
                "this processor is older than x86-64-v2 (2009): llama.cpp is some twenty times slower on it"
            );
        }
        return Ok(BASE);
    };
    #[expect(unsafe_code, reason = "the bindings have no safe wrapper")]
    // SAFETY: no model is loaded yet, so nothing refers to the back end that leaves; the other is a static of the binary, and its
    // instructions are there, as `fits` has found.
    unsafe {
        llama_cpp_sys_2::ggml_backend_unload(llama_cpp_sys_2::ggml_backend_cpu_reg());
        llama_cpp_sys_2::ggml_backend_register((level.entrance)());
    }
    Ok(level.name)
}

/// What the binary holds on every architecture.
const BASE: &str = if cfg!(target_arch = "x86_64") {
    "x86-64"
} else {
    std::env::consts::ARCH
};

struct Level {
    name: &'static str,
    fits: fn() -> bool,
    entrance: unsafe extern "C" fn() -> llama_cpp_sys_2::ggml_backend_reg_t,
}

/// Best first.
const LEVELS: &[Level] = &[
    #[cfg(karez_level = "v4_bf16")]
    Level {
        name: "x86-64-v4+bf16",
        fits: x86::v4_bf16,
        entrance: x86::karez_level_v4_bf16,
    },
    #[cfg(karez_level = "v4_vnni")]
    Level {
        name: "x86-64-v4+vnni",
        fits: x86::v4_vnni,
        entrance: x86::karez_level_v4_vnni,
    },
    #[cfg(karez_level = "v4")]
    Level {
        name: "x86-64-v4",
        fits: x86::v4,
        entrance: x86::karez_level_v4,
    },
    #[cfg(karez_level = "v3_vnni")]
    Level {
        name: "x86-64-v3+vnni",
        fits: x86::v3_vnni,
        entrance: x86::karez_level_v3_vnni,
    },
    #[cfg(karez_level = "v3")]
    Level {
        name: "x86-64-v3",
        fits: x86::v3,
        entrance: x86::karez_level_v3,
    },
    #[cfg(karez_level = "v2_avx")]
    Level {
        name: "x86-64-v2+avx",
        fits: x86::v2_avx,
        entrance: x86::karez_level_v2_avx,
    },
    #[cfg(karez_level = "v2")]
    Level {
        name: "x86-64-v2",
        fits: x86::v2,
        entrance: x86::karez_level_v2,
    },
];

/// What each level was compiled for, and where it begins. The system must know the wide registers too; the macro asks that.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod x86 {
    use llama_cpp_sys_2::ggml_backend_reg_t;
    use std::arch::is_x86_feature_detected as has;

    #[expect(unsafe_code, reason = "objects that the build script makes")]
    unsafe extern "C" {
        pub(super) fn karez_level_v2() -> ggml_backend_reg_t;
        pub(super) fn karez_level_v2_avx() -> ggml_backend_reg_t;
        pub(super) fn karez_level_v3() -> ggml_backend_reg_t;
        pub(super) fn karez_level_v3_vnni() -> ggml_backend_reg_t;
        pub(super) fn karez_level_v4() -> ggml_backend_reg_t;
        pub(super) fn karez_level_v4_vnni() -> ggml_backend_reg_t;
        pub(super) fn karez_level_v4_bf16() -> ggml_backend_reg_t;
    }

    pub(super) fn v2() -> bool {
        has!("sse4.2") && has!("popcnt")
    }

    pub(super) fn v2_avx() -> bool {
        v2() && has!("avx")
    }

    pub(super) fn v3() -> bool {
        v2_avx() && has!("avx2") && has!("fma") && has!("f16c") && has!("bmi2")
    }

    pub(super) fn v3_vnni() -> bool {
        v3() && has!("avxvnni")
    }

    pub(super) fn v4() -> bool {
        let wide = has!("avx512f") && has!("avx512cd") && has!("avx512vl");
        v3() && wide && has!("avx512dq") && has!("avx512bw")
    }

    pub(super) fn v4_vnni() -> bool {
        v4() && has!("avx512vnni")
    }

    pub(super) fn v4_bf16() -> bool {
        v4_vnni() && has!("avx512bf16")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_that_is_not_here_is_refused_with_those_that_are() {
        let error = place(Some("x86-64-v9")).unwrap_err().to_string();
        assert!(error.contains("x86-64-v9") && error.contains(BASE), "{error}");
        assert_eq!(usable().last(), Some(&BASE));
    }
}
