//! `base+adapter`: a base model with an adapter over it, each by its name in the catalogue or its path on this machine.
use crate::{
    fault::{Kind, fault},
    link::{Artifacts, Link},
    out::Out,
    task,
};
use anyhow::{Context as _, Result};
use karez_core::artifact::ArtifactRef;
use karez_engine::inspect;
use std::path::Path;

/// The adapter in a folder that `karez finetune` left.
const ADAPTER: &str = "adapter.gguf";

/// A model to generate with.
pub(crate) struct Chosen {
    pub(crate) model: ArtifactRef,
    pub(crate) adapter: ArtifactRef,
    /// For people: both names without their paths.
    pub(crate) name: String,
}

/// One half of a name.
struct Half {
    artifact: ArtifactRef,
    /// It lies on this machine, and may have to be sent.
    here: bool,
}

/// Splits `base+adapter`. A path may hold a plus sign; the last one counts.
pub(crate) fn halves(name: &str) -> Option<(&str, &str)> {
    name.rsplit_once('+')
        .filter(|(base, adapter)| !base.is_empty() && !adapter.is_empty())
}

/// Finds both halves; with `out`, what lies on this machine is sent to the scheduler.
pub(crate) async fn choose(
    out: Option<&Out>,
    link: &Link,
    artifacts: &Artifacts,
    name: &str,
) -> Result<Chosen> {
    let Some((base, adapter)) = halves(name) else {
        return Err(fault(
            Kind::Usage,
            format!("{name:?} is not BASE+ADAPTER: `karez generate --help` shows how it is used"),
        ));
    };
    let model = match named(link, base).await {
        Ok(base) => Half {
            artifact: base,
            here: false,
        },
        Err(_) if Path::new(base).exists() => Half {
            artifact: own_base(artifacts, Path::new(base)).await?,
            here: true,
        },
        // The catalogue's own words, with the names that are near.
        Err(error) => return Err(error),
    };
    let over = match named(link, adapter).await {
        _ if Path::new(adapter).exists() => Half {
            artifact: own_adapter(artifacts, Path::new(adapter), model.artifact).await?,
            here: true,
        },
        Ok(adapter) => Half {
            artifact: adapter,
            here: false,
        },
        Err(_) => return Err(missing(adapter)),
    };
    for (what, half) in [("the base model", &model), ("the adapter", &over)] {
        if let (Some(out), true) = (out, half.here) {
            artifacts.push(out, what, half.artifact).await?;
        }
    }
    Ok(Chosen {
        model: model.artifact,
        adapter: over.artifact,
        name: format!("{}+{}", short(base), short(adapter)),
    })
}

/// The last part of a path, as long as an order may hold it.
fn short(name: &str) -> String {
    let last = Path::new(name).file_name().map(|last| last.to_string_lossy());
    let last = last.filter(|last| last != "..").unwrap_or("model".into());
    last.chars().filter(|c| !c.is_control()).take(30).collect()
}

fn missing(name: &str) -> anyhow::Error {
    fault(
        Kind::NotFound,
        format!(
            "{name:?} is neither a model of the scheduler nor a file or folder here: an adapter is the folder that `karez \
             finetune` wrote, or its adapter.gguf"
        ),
    )
}

/// What the catalogue has under that name, for generating.
async fn named(link: &Link, name: &str) -> Result<ArtifactRef> {
    let (artifact, found) = task::model(link, name).await?;
    task::expect_format(&found, "gguf", "generate")?;
    Ok(artifact)
}

/// A GGUF file as it is, or a Hugging Face folder turned into one.
async fn own_base(artifacts: &Artifacts, path: &Path) -> Result<ArtifactRef> {
    let (store, from) = (artifacts.store.clone(), path.to_owned());
    let kept = tokio::task::spawn_blocking(move || -> Result<ArtifactRef> {
        if from.is_file() {
            inspect::inspect(&from).map_err(|error| fault(Kind::Refused, error.to_string()))?;
            return store.add_file(&from).with_context(|| from.display().to_string());
        }
        let file = converted(&from)?;
        Ok(store.add_file(file.path())?)
    });
    kept.await?
}

/// The base of a folder as GGUF: the same bytes for the same folder, so that adapters can name it by digest.
#[cfg(feature = "engine")]
fn converted(folder: &Path) -> Result<tempfile::NamedTempFile> {
    let file = tempfile::NamedTempFile::new()?;
    let mut out = std::io::BufWriter::new(file.reopen()?);
    karez_engine::train::gguf::export_base(folder, &mut out)
        .and_then(|()| Ok(std::io::Write::flush(&mut out)?))
        .map_err(|error| {
            let why = format!("{} cannot be served: {error}", folder.display());
            fault(Kind::Refused, why)
        })?;
    Ok(file)
}

#[cfg(not(feature = "engine"))]
fn converted(folder: &Path) -> Result<tempfile::NamedTempFile> {
    let why = format!("{}: this build cannot turn a folder into GGUF", folder.display());
    Err(fault(Kind::Refused, why))
}

/// An adapter of this machine, which must be one for `base`.
async fn own_adapter(artifacts: &Artifacts, path: &Path, base: ArtifactRef) -> Result<ArtifactRef> {
    let file = if path.is_dir() {
        path.join(ADAPTER)
    } else {
        path.to_owned()
    };
    let base = base.digest.to_string();
    let store = artifacts.store.clone();
    let kept = tokio::task::spawn_blocking(move || -> Result<ArtifactRef> {
        let found = inspect::adapter(&file).map_err(|error| fault(Kind::Refused, error.to_string()))?;
        if let Some(made_for) = found.base.filter(|made_for| *made_for != base) {
            let why = format!(
                "{} is an adapter for the base {made_for}, this one is {base}: give the folder that it was trained on as the base",
                file.display()
            );
            return Err(fault(Kind::Refused, why));
        }
        store.add_file(&file).with_context(|| file.display().to_string())
    });
    kept.await?
}

#[cfg(test)]
mod tests {
    use super::halves;

    #[test]
    fn the_last_plus_parts_base_and_adapter() {
        assert_eq!(halves("base+adapter"), Some(("base", "adapter")));
        assert_eq!(halves("./c++/base+./out"), Some(("./c++/base", "./out")));
        for whole in ["base", "+adapter", "base+", ""] {
            assert_eq!(halves(whole), None);
        }
    }
}
