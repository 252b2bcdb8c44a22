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
/// The same for a provider's trainer: PyTorch and its threads.
#[cfg(target_os = "linux")]
const TRAINER_SLACK: u64 = 8 << 30;

/// Closes the sandbox around this thread and all it will start. `model` stays readable, and so do the files that are or
/// will be in `adapters`. Those in `scratch` may be written too.
#[cfg(target_os = "linux")]
pub(super) fn close(
    model: Option<&Path>,
    adapters: Option<&Path>,
    scratch: Option<&Path>,
    memory_limit: Option<Bytes>,
) -> Isolation {
    if !limit(memory_limit.map(|Bytes(limit)| Bytes(limit.saturating_add(MEMORY_SLACK)))) {
        return Isolation::None;
    }
    let landlock = match landlock(model.into_iter().chain(adapters), scratch) {
        Ok(()) => true,
        Err(error) => {
            warn("Landlock", &error);
            false
        }
    };
    match (seccomp(&[]), landlock) {
        (Ok(()), true) => Isolation::LandlockSeccomp,
        (Ok(()), false) => Isolation::Seccomp,
        (Err(error), _) => {
            warn("seccomp", &error);
            Isolation::None
        }
    }
}

#[cfg(target_os = "linux")]
fn warn(what: &str, error: &dyn std::fmt::Display) {
    eprintln!("sandbox: {what} is not in force: {error}");
}

/// No core files, no tracing, no new privileges, and no more private memory than that. False when the rest would not hold.
#[cfg(target_os = "linux")]
fn limit(memory: Option<Bytes>) -> bool {
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
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
    if let Some(Bytes(limit)) = memory {
        // Private memory only: a model file that is mapped can be dropped and read again.
        let limit = Some(limit);
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
        return false;
    }
    true
}

/// Closes a wider sandbox, in which a provider's own trainer can be started: system folders and `reads` can be read, `scratch`
/// written, and no socket but a local one opened, nobody traced, nothing mounted. [`narrow`] is for this process alone,
/// once the other one runs.
#[cfg(target_os = "linux")]
pub(super) fn close_around(
    model: &Path,
    reads: &[std::path::PathBuf],
    scratch: &Path,
    memory_limit: Option<Bytes>,
) -> Isolation {
    if !limit(memory_limit.map(|Bytes(limit)| Bytes(limit.saturating_add(TRAINER_SLACK)))) {
        return Isolation::None;
    }
    if let Err(error) = landlock_around(model, reads, scratch) {
        warn("Landlock", &error);
    }
    match refuse(REFUSED) {
        // Less than the tier of that name promises, even with Landlock: it reads more and may start programs.
        Ok(()) => Isolation::Seccomp,
        Err(error) => {
            warn("seccomp", &error);
            Isolation::None
        }
    }
}

/// After [`close_around`]: what remains allowed to this process, and not to the one it started.
#[cfg(target_os = "linux")]
pub(super) fn narrow() {
    if let Err(error) = seccomp(&[
        libc::SYS_wait4,
        libc::SYS_waitid,
        libc::SYS_kill,
        libc::SYS_pidfd_send_signal,
        libc::SYS_unlink,
        libc::SYS_unlinkat,
    ]) {
        warn("seccomp", &error);
    }
}

/// There is no sandbox on this system.
#[cfg(not(target_os = "linux"))]
pub(super) fn close_around(_: &Path, _: &[std::path::PathBuf], _: &Path, _: Option<Bytes>) -> Isolation {
    Isolation::None
}

/// There is no sandbox on this system.
#[cfg(not(target_os = "linux"))]
pub(super) fn narrow() {}

/// There is no sandbox on this system.
#[cfg(not(target_os = "linux"))]
pub(super) fn close(_: Option<&Path>, _: Option<&Path>, _: Option<&Path>, _: Option<Bytes>) -> Isolation {
    Isolation::None
}

/// Where programs and their libraries lie, on most systems; of `/etc` only what they look up.
#[cfg(target_os = "linux")]
const SYSTEM: [&str; 18] = [
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/opt",
    "/proc",
    "/sys",
    "/nix/store",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/alternatives",
    "/etc/localtime",
    "/etc/os-release",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/group",
    "/etc/nvidia",
];
/// Devices that any program may need; a GPU's are found by their names.
#[cfg(target_os = "linux")]
const DEVICES: [&str; 5] = [
    "/dev/null",
    "/dev/zero",
    "/dev/random",
    "/dev/urandom",
    "/dev/shm",
];

#[cfg(target_os = "linux")]
fn landlock_around(model: &Path, reads: &[std::path::PathBuf], scratch: &Path) -> Result<(), String> {
    use landlock::{ABI, AccessFs, PathBeneath, PathFd, RulesetCreatedAttr};
    let abi = ABI::V6;
    let read = AccessFs::from_read(abi);
    let file = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
    let folder = read | AccessFs::from_write(abi);
    let mut rules = all_handled()?;
    let gpus = std::fs::read_dir("/dev").into_iter().flatten().flatten();
    let gpus = gpus.map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("nvidia") || name == "dri" || name == "kfd"
    });
    let devices: Vec<std::path::PathBuf> = DEVICES.iter().map(Into::into).chain(gpus).collect();
    let system = SYSTEM.iter().map(Path::new);
    let places = system
        .chain([model])
        .chain(reads.iter().map(std::path::PathBuf::as_path))
        .map(|place| (place, read))
        .chain(
            devices
                .iter()
                .map(|place| (place.as_path(), file | read | AccessFs::from_write(abi))),
        )
        .chain([(scratch, folder)]);
    for (place, access) in places {
        let Ok(open) = PathFd::new(place) else { continue };
        let access = if place.is_dir() {
            access
        } else {
            access & AccessFs::from_file(abi)
        };
        rules = rules
            .add_rule(PathBeneath::new(open, access))
            .map_err(|error| error.to_string())?;
    }
    in_force(rules.restrict_self())
}

/// Rules that refuse everything so far. Landlock holds for this thread and its children: a thread that exists already
/// would stay free.
#[cfg(target_os = "linux")]
fn all_handled() -> Result<landlock::RulesetCreated, String> {
    use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, Scope};
    let threads = std::fs::read_dir("/proc/self/task")
        .map_err(|error| error.to_string())?
        .count();
    if threads != 1 {
        return Err(format!(
            "{threads} threads are running and only one would be held"
        ));
    }
    let abi = ABI::V6;
    Ruleset::default()
        .handle_access(AccessFs::from_all(abi))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(abi)))
        .and_then(|rules| rules.scope(Scope::from_all(abi)))
        .and_then(|rules| rules.create())
        .map_err(|error| error.to_string())
}

#[cfg(target_os = "linux")]
fn in_force(restricted: Result<landlock::RestrictionStatus, landlock::RulesetError>) -> Result<(), String> {
    use landlock::RulesetStatus;
    match restricted.map_err(|error| error.to_string())?.ruleset {
        RulesetStatus::NotEnforced => Err("this kernel does not offer it".into()),
        RulesetStatus::PartiallyEnforced | RulesetStatus::FullyEnforced => Ok(()),
    }
}

#[cfg(target_os = "linux")]
fn landlock<'a>(readable: impl Iterator<Item = &'a Path>, scratch: Option<&Path>) -> Result<(), String> {
    use landlock::{ABI, AccessFs, PathBeneath, PathFd, RulesetCreatedAttr};
    let text = |error: &dyn std::error::Error| error.to_string();
    let abi = ABI::V6;
    let mut rules = all_handled()?;
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
    in_force(rules.restrict_self())
}

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
fn seccomp(more: &[i64]) -> Result<(), String> {
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
    allowed.extend(more.iter().map(|call| (*call, Vec::new())));
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
fn seccomp(_: &[i64]) -> Result<(), String> {
    Err(format!("no filter for {}", std::env::consts::ARCH))
}

/// Refuses those calls, and sockets that are not local.
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
fn refuse(calls: &[i64]) -> Result<(), String> {
    use seccompiler::{
        BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
        SeccompRule, TargetArch,
    };
    let text = |error: &dyn std::error::Error| error.to_string();
    let mut rules: std::collections::BTreeMap<i64, Vec<SeccompRule>> =
        calls.iter().map(|call| (*call, Vec::new())).collect();
    let local = libc::AF_UNIX as u64;
    let foreign = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, local)
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(|error| text(&error))?;
    rules.insert(libc::SYS_socket, vec![foreign]);
    #[cfg(target_arch = "x86_64")]
    let arch = TargetArch::x86_64;
    #[cfg(target_arch = "aarch64")]
    let arch = TargetArch::aarch64;
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM as u32),
        arch,
    )
    .map_err(|error| text(&error))?;
    let program: BpfProgram = filter
        .try_into()
        .map_err(|error: seccompiler::BackendError| text(&error))?;
    seccompiler::apply_filter_all_threads(&program).map_err(|error| text(&error))
}

#[cfg(all(
    target_os = "linux",
    not(any(target_arch = "x86_64", target_arch = "aarch64"))
))]
fn refuse(_: &[i64]) -> Result<(), String> {
    Err(format!("no filter for {}", std::env::consts::ARCH))
}

/// What no trainer needs, and what could reach beyond the sandbox.
#[cfg(target_os = "linux")]
const REFUSED: &[i64] = &[
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_add_key,
    libc::SYS_keyctl,
    libc::SYS_request_key,
    libc::SYS_userfaultfd,
    libc::SYS_open_by_handle_at,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
];

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
