//! Making a node's directory: key, configuration, and the first word with its scheduler.
use crate::{
    config::{NodeConfig, SchedulerEntry, Template, is_host_port, template},
    files::NodeFiles,
};
use karez_core::{
    id::{Country, Institution},
    invite::{self, InviteError},
    key::{NodeId, PublicKey, SchedulerId, SecretKey},
    records::Role,
    translate::MESSAGE_BYTES_MAX,
    unit::Rate,
};
use karez_net::{
    control::{ConnectError, connect},
    identity::{self, IdentityError},
};
use karez_proto::control::{JoinRequest, control_client::ControlClient};
use std::{
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// The scheduler must have answered by then.
const JOIN_MAX: Duration = Duration::from_secs(15);

/// How the node comes to its scheduler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JoinBy {
    /// With a pasted `karez1…` invitation.
    Invitation(String),
    /// At a scheduler whose admission is open.
    Open {
        /// Its key.
        scheduler: SchedulerId,
        /// `host:port` of its control API.
        control_addr: String,
        /// Its libp2p multiaddresses.
        peer_addrs: Vec<String>,
        /// Whose machine this is.
        institution: Institution,
    },
    /// Later: only the directory is made.
    Nobody {
        /// Whose machine this is.
        institution: Institution,
    },
}

/// What a new node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitOptions {
    /// How it joins.
    pub join: JoinBy,
    /// A name for people.
    pub name: String,
    /// Where it stands.
    pub country: Country,
    /// What one CPU slot costs for an hour.
    pub cpu_rate: Rate,
    /// Leases on the CPU at once.
    pub cpu_slots: u32,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Initialised {
    /// The new node's id.
    pub node: NodeId,
    /// Whose machine it is, in the scheduler's books.
    pub institution: Institution,
    /// Where its configuration lies.
    pub config: PathBuf,
    /// Whether a scheduler admitted it.
    pub joined: bool,
}

/// Why no node came about.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// There is one already.
    #[error("{} is a node already: it was left as it is. Choose another directory with --dir", dir.display())]
    Exists {
        /// Where.
        dir: PathBuf,
    },
    /// The pasted text is no invitation.
    #[error(transparent)]
    Invitation(#[from] InviteError),
    /// The invitation is for somebody else.
    #[error("this invitation is for a {}, not for a node: ask for one with `karez scheduler invite --role node`", .0.as_str())]
    WrongRole(Role),
    /// It came too late.
    #[error("this invitation has expired: ask for a new one")]
    Expired,
    /// A setting is not allowed.
    #[error("{0}")]
    Setting(String),
    /// The key could not be made.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The scheduler cannot be reached. Nothing was written but the key, which the next attempt uses again.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The scheduler said no. Nothing was written but the key, which the next attempt uses again.
    #[error("the scheduler at {addr} refused: {why}")]
    Refused {
        /// Where.
        addr: String,
        /// In its own words.
        why: String,
    },
    /// The disk failed.
    #[error("{}: {error}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What happened.
        error: io::Error,
    },
}

/// Makes the node's directory, joins, and writes `node.toml` last: a directory without one is not a node, so an
/// attempt that failed can simply be repeated and keeps its key.
pub async fn init(dir: &Path, options: InitOptions) -> Result<Initialised, InitError> {
    let files = NodeFiles::new(dir);
    if files.config().exists() {
        return Err(InitError::Exists { dir: dir.to_owned() });
    }
    let (schedulers, institution, invitation) = whom(&options.join)?;
    let mut plan = Template {
        name: options.name,
        institution,
        country: options.country,
        cpu_rate: options.cpu_rate,
        cpu_slots: options.cpu_slots,
        schedulers,
    };
    // Whatever the daemon would refuse is refused now, before anybody is told of this node.
    NodeConfig::parse(&template(&plan), &files.config()).map_err(|e| InitError::Setting(e.to_string()))?;

    let io = |path: PathBuf| move |error| InitError::Io { path, error };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(io(dir.to_owned()))?;
    let secret = match identity::create(&files.key()) {
        Err(IdentityError::Exists { .. }) => identity::load(&files.key(), "node")?,
        other => other?,
    };
    let joined = match plan.schedulers.first() {
        None => false,
        Some(scheduler) => {
            plan.institution = join(&secret, scheduler, &plan, invitation).await?;
            true
        }
    };
    write_new(&files.config(), template(&plan).as_bytes()).map_err(io(files.config()))?;
    Ok(Initialised {
        node: NodeId(PublicKey::of(&secret)),
        institution: plan.institution,
        config: files.config(),
        joined,
    })
}

fn whom(join: &JoinBy) -> Result<(Vec<SchedulerEntry>, Institution, String), InitError> {
    match join {
        JoinBy::Invitation(text) => {
            let invitation = invite::decode(text)?;
            if invitation.role != Role::Node {
                return Err(InitError::WrongRole(invitation.role));
            }
            let now = SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default();
            if u128::from(invitation.expires_at.0) <= now.as_millis() {
                return Err(InitError::Expired);
            }
            let entry = SchedulerEntry {
                key: invitation.scheduler,
                control_addr: invitation.control_addr.clone(),
                peer_addrs: invitation.peer_addrs.clone(),
            };
            Ok((
                vec![entry],
                invitation.institution.clone(),
                invite::encode(&invitation),
            ))
        }
        JoinBy::Open {
            scheduler,
            control_addr,
            peer_addrs,
            institution,
        } => {
            if !is_host_port(control_addr) {
                return Err(InitError::Setting(format!("{control_addr:?} is not host:port")));
            }
            let entry = SchedulerEntry {
                key: *scheduler,
                control_addr: control_addr.clone(),
                peer_addrs: peer_addrs.clone(),
            };
            Ok((vec![entry], institution.clone(), String::new()))
        }
        JoinBy::Nobody { institution } => Ok((Vec::new(), institution.clone(), String::new())),
    }
}

/// Asks to be admitted; gives the institution under which the scheduler keeps this node.
async fn join(
    secret: &SecretKey,
    scheduler: &SchedulerEntry,
    plan: &Template,
    invitation: String,
) -> Result<Institution, InitError> {
    let addr = scheduler.control_addr.clone();
    let channel = connect(&addr, secret, scheduler.key.0).await?;
    let mut client = ControlClient::new(channel).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let request = JoinRequest {
        invitation,
        name: plan.name.clone(),
        role: Role::Node.as_str().into(),
        institution: plan.institution.to_string(),
    };
    let refused = |why: String| InitError::Refused {
        addr: addr.clone(),
        why,
    };
    let reply = tokio::time::timeout(JOIN_MAX, client.join(request))
        .await
        .map_err(|_| refused(format!("no answer in {} s", JOIN_MAX.as_secs())))?
        .map_err(|status| refused(status.message().to_owned()))?
        .into_inner();
    reply
        .institution
        .parse()
        .map_err(|_| refused("its answer names no institution".into()))
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // By rename, so that a crash leaves a whole file or none.
    let draft = path.with_extension("toml.new");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&draft)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&draft, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn options(join: JoinBy) -> InitOptions {
        InitOptions {
            join,
            name: "n1".into(),
            country: "KE".parse().unwrap(),
            cpu_rate: Rate::FREE,
            cpu_slots: 1,
        }
    }

    #[tokio::test]
    async fn a_directory_becomes_a_node_once() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("node");
        let nobody = options(JoinBy::Nobody {
            institution: "uni-a".parse().unwrap(),
        });
        let made = init(&dir, nobody.clone()).await.unwrap();
        assert!(!made.joined);
        let files = NodeFiles::new(&dir);
        assert_eq!(
            std::fs::metadata(files.key()).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(NodeConfig::load(&files.config()).unwrap().name, "n1");
        assert!(matches!(init(&dir, nobody).await, Err(InitError::Exists { .. })));
    }

    #[tokio::test]
    async fn an_unreachable_scheduler_leaves_no_node_and_keeps_the_key() {
        let dir = tempfile::tempdir().unwrap();
        let join = JoinBy::Open {
            scheduler: SchedulerId(PublicKey::of(&SecretKey::from_bytes(&[3; 32]))),
            control_addr: "127.0.0.1:1".into(),
            peer_addrs: vec![],
            institution: "uni-a".parse().unwrap(),
        };
        let error = init(dir.path(), options(join)).await.unwrap_err();
        assert!(
            matches!(error, InitError::Connect(ConnectError::Refused { .. })),
            "{error}"
        );
        let files = NodeFiles::new(dir.path());
        assert!(!files.config().exists());
        let key = std::fs::read(files.key()).unwrap();
        init(
            dir.path(),
            options(JoinBy::Nobody {
                institution: "uni-a".parse().unwrap(),
            }),
        )
        .await
        .unwrap();
        assert_eq!(std::fs::read(files.key()).unwrap(), key);
    }
}
