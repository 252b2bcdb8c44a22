//! Closing the worker off before it opens a model.
//!
//! Afterwards it can read its model and nothing else of the file system, write nothing, open no socket, start no
//! program, and trace or signal nobody. What the kernel does not offer is left out, and [`close`] says which tier
//! was really reached.
use std::path::Path;

use crate::protocol::Isolation;
use crate::unit::Bytes;

/// Private memory that a process needs besides its model.
#[cfg(target_os = "linux")]
const MEMORY_SLACK: u64 = 512 << 20;

/// Closes the sandbox around this thread and all it will start. `model` stays readable, and so do the files that are or
/// will be in `adapters`. Those in `scratch` may be written too.
#[cfg(target_os = "linux")]
pub(super) fn close(
    model: Option<&Path>,
    adapters: Option<&Path>,
    scratch: Option<&Path>,
    memory_limit: Option<Bytes>,
) -> Isolation {
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
    let warn =
        |what: &str, error: &dyn std::fmt::Display| eprintln!("sandbox: {what} is not in force: {error}");
    // A core file would hold the guest's data.
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    if let Err(error) = setrlimit(Resource::Core, none) {
        warn("no core files", &error);
    }
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        warn("no tracing of this process", &error);
    }
    if let Some(Bytes(limit)) = memory_limit {
        // Private memory only: a model file that is mapped can be dropped and read again.
        let limit = Some(limit.saturating_add(MEMORY_SLACK));
        if let Err(error) = setrlimit(
            Resource::Data,
            Rlimit {
                current: limit,
                maximum: limit,
            },
        ) {
            warn("the memory limit", &error);
        }
    }
    if let Err(error) = rustix::thread::set_no_new_privs(true) {
        warn("no new privileges", &error);
        return Isolation::None;
    }
    let landlock = match landlock(model.into_iter().chain(adapters), scratch) {
        Ok(()) => true,
        Err(error) => {
            warn("Landlock", &error);
            false
        }
    };
    match (seccomp(), landlock) {
        (Ok(()), true) => Isolation::LandlockSeccomp,
        (Ok(()), false) => Isolation::Seccomp,
        (Err(error), _) => {
            warn("seccomp", &error);
            Isolation::None
        }
    }
}

/// There is no sandbox on this system.
#[cfg(not(target_os = "linux"))]
pub(super) fn close(_: Option<&Path>, _: Option<&Path>, _: Option<&Path>, _: Option<Bytes>) -> Isolation {
    Isolation::None
}

#[cfg(target_os = "linux")]
fn landlock<'a>(readable: impl Iterator<Item = &'a Path>, scratch: Option<&Path>) -> Result<(), String> {
    use landlock::{
        ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr,
        RulesetStatus, Scope,
    };
    // Landlock holds for this thread and its children: a thread that exists already would stay free.
    let threads = std::fs::read_dir("/proc/self/task")
        .map_err(|error| error.to_string())?
        .count();
    if threads != 1 {
        return Err(format!(
            "{threads} threads are running and only one would be held"
        ));
    }
    let text = |error: &dyn std::error::Error| error.to_string();
    let abi = ABI::V6;
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(abi))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(abi)))
        .and_then(|rules| rules.scope(Scope::from_all(abi)))
        .and_then(|rules| rules.create())
        .map_err(|error| text(&error))?;
    for path in readable {
        let open = PathFd::new(path).map_err(|error| text(&error))?;
        let access = if path.is_dir() {
            AccessFs::ReadFile | AccessFs::ReadDir
        } else {
            AccessFs::ReadFile.into()
        };
        rules = rules
            .add_rule(PathBeneath::new(open, access))
            .map_err(|error| text(&error))?;
    }
    if let Some(scratch) = scratch {
        let open = PathFd::new(scratch).map_err(|error| text(&error))?;
        let access = AccessFs::ReadFile
            | AccessFs::ReadDir
            | AccessFs::WriteFile
            | AccessFs::MakeReg
            | AccessFs::Truncate;
        rules = rules
            .add_rule(PathBeneath::new(open, access))
            .map_err(|error| text(&error))?;
    }
    if cfg!(any(feature = "cuda", feature = "vulkan")) {
        // A GPU's driver lives in these, and is spoken to through device files.
        let read = AccessFs::from_read(abi);
        let device = AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::WriteFile | AccessFs::IoctlDev;
        let places = [
            ("/usr", read),
            ("/lib", read),
            ("/lib64", read),
            ("/opt", read),
            ("/etc", read),
            ("/proc", read),
        ];
        for (place, access) in places.into_iter().chain([("/sys", read), ("/dev", device)]) {
            if let Ok(open) = PathFd::new(place) {
                rules = rules
                    .add_rule(PathBeneath::new(open, access))
                    .map_err(|error| text(&error))?;
            }
        }
    }
    let status = rules.restrict_self().map_err(|error| text(&error))?;
    match status.ruleset {
        RulesetStatus::NotEnforced => Err("this kernel does not offer it".into()),
        RulesetStatus::PartiallyEnforced | RulesetStatus::FullyEnforced => Ok(()),
    }
}

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
fn seccomp() -> Result<(), String> {
    use seccompiler::{
        BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
        SeccompRule, TargetArch,
    };
    use std::collections::BTreeMap;

    #[cfg(target_arch = "x86_64")]
    let arch = TargetArch::x86_64;
    #[cfg(target_arch = "aarch64")]
    let arch = TargetArch::aarch64;
    let text = |error: &dyn std::error::Error| error.to_string();
    let install = |rules: BTreeMap<i64, Vec<SeccompRule>>, other: SeccompAction, listed: SeccompAction| {
        let filter = SeccompFilter::new(rules, other, listed, arch).map_err(|error| text(&error))?;
        let program: BpfProgram = filter
            .try_into()
            .map_err(|error: seccompiler::BackendError| text(&error))?;
        seccompiler::apply_filter_all_threads(&program).map_err(|error| text(&error))
    };
    let only = |argument: u8, op: SeccompCmpOp, value: u64| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Qword, op, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
            .map_err(|error| text(&error))
    };

    // clone3 hides its flags in memory, where a filter cannot see them. Where it is missing, libraries use clone.
    let missing = [(libc::SYS_clone3, Vec::new())];
    install(
        missing.into_iter().collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )?;

    let mut allowed: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    #[cfg(target_arch = "x86_64")]
    allowed.extend(ALLOWED_X86.iter().map(|call| (*call, Vec::new())));
    // Threads of this process, and no other processes.
    let thread = libc::CLONE_THREAD as u64;
    allowed.insert(
        libc::SYS_clone,
        vec![only(0, SeccompCmpOp::MaskedEq(thread), thread)?],
    );
    // Naming threads and memory.
    let names = [libc::PR_SET_NAME as u64, 0x5356_4d41];
    let names = names
        .into_iter()
        .map(|option| only(0, SeccompCmpOp::Eq, option))
        .collect::<Result<_, _>>()?;
    allowed.insert(libc::SYS_prctl, names);
    // To itself, as abort does.
    let own = u64::from(std::process::id());
    allowed.insert(libc::SYS_tgkill, vec![only(0, SeccompCmpOp::Eq, own)?]);
    if cfg!(any(feature = "cuda", feature = "vulkan")) {
        for call in [
            libc::SYS_ioctl,
            libc::SYS_memfd_create,
            libc::SYS_ftruncate,
            libc::SYS_mlock,
        ] {
            allowed.insert(call, Vec::new());
        }
    }
    install(
        allowed,
        SeccompAction::Errno(libc::EPERM as u32),
        SeccompAction::Allow,
    )
}

#[cfg(all(
    target_os = "linux",
    not(any(target_arch = "x86_64", target_arch = "aarch64"))
))]
fn seccomp() -> Result<(), String> {
    Err(format!("no filter for {}", std::env::consts::ARCH))
}

/// What computing takes: files that are open or may be opened, memory, threads, time. All else is refused with
/// EPERM, so that a library that probes for something goes on without it.
#[cfg(target_os = "linux")]
const ALLOWED: &[i64] = &[
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_openat,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
    libc::SYS_lseek,
    libc::SYS_getdents64,
    libc::SYS_fadvise64,
    libc::SYS_readahead,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_mbind,
    libc::SYS_get_mempolicy,
    libc::SYS_set_mempolicy,
    libc::SYS_membarrier,
    libc::SYS_brk,
    libc::SYS_clone3,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_getpriority,
    libc::SYS_getcpu,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_times,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The older names that libraries still use on x86-64.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
const ALLOWED_X86: &[i64] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_epoll_wait,
    libc::SYS_pipe,
    libc::SYS_dup2,
    libc::SYS_time,
    libc::SYS_arch_prctl,
];
