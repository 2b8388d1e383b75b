//! Trusted publishers, whose names win over those of others.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Mutex,
};

use weft_net::PeerId;

use crate::{
    Error, HomeError, Node,
    home::{io_error, lines},
    operation::blocking,
};

/// The most publishers that may be trusted.
const MAX_TRUSTED: usize = 4096;

/// The list of trusted publishers, and its file.
#[derive(Debug)]
pub(crate) struct Trusted {
    path: PathBuf,
    peers: Mutex<BTreeSet<PeerId>>,
}

impl Trusted {
    /// Reads the file, which has one PeerId on each line. The list is empty if there is no file.
    pub(crate) fn open(path: &Path) -> Result<Self, HomeError> {
        let lines = lines::read(path).map_err(io_error("cannot read", path))?;
        let peers = lines.iter().map(|line| {
            let bad = |_| HomeError::BadTrust {
                path: path.to_owned(),
                line: line.chars().take(100).collect(),
            };
            line.parse().map_err(bad)
        });
        Ok(Self {
            path: path.to_owned(),
            peers: Mutex::new(peers.collect::<Result<_, _>>()?),
        })
    }

    pub(crate) fn peers(&self) -> BTreeSet<PeerId> {
        let peers = self.peers.lock();
        peers
            .expect("nothing panics while holding the lock")
            .clone()
    }

    /// Changes the list on disk, and then in memory. Returns the new list. Blocks.
    fn change(&self, add: &[PeerId], remove: &[PeerId]) -> Result<BTreeSet<PeerId>, HomeError> {
        let mut peers = self
            .peers
            .lock()
            .expect("nothing panics while holding the lock");
        let mut changed = peers.clone();
        changed.extend(add);
        for peer in remove {
            changed.remove(peer);
        }
        if changed.len() > MAX_TRUSTED {
            return Err(HomeError::TooManyTrusted(MAX_TRUSTED));
        }
        if changed != *peers {
            lines::write(&self.path, changed.iter().map(ToString::to_string))
                .map_err(io_error("cannot write", &self.path))?;
            peers.clone_from(&changed);
        }
        Ok(changed)
    }
}

/// The trusted publishers, whose names win over those of others; see [`Node::trust`]. The list is kept in the home.
#[derive(Debug, Clone)]
pub struct Trust {
    node: Node,
}

impl Trust {
    pub(crate) fn new(node: Node) -> Self {
        Self { node }
    }

    /// Returns the trusted publishers.
    pub fn list(&self) -> Vec<PeerId> {
        self.node.trusted().peers().into_iter().collect()
    }

    /// Adds publishers to the list and removes others. Returns the new list.
    ///
    /// # Errors
    /// [`Error::Home`] if the list would be too long or cannot be written. Then it is unchanged.
    pub async fn change(
        &self,
        add: impl IntoIterator<Item = PeerId>,
        remove: impl IntoIterator<Item = PeerId>,
    ) -> Result<Vec<PeerId>, Error> {
        let (add, remove): (Vec<_>, Vec<_>) =
            (add.into_iter().collect(), remove.into_iter().collect());
        let node = self.node.clone();
        let changed = blocking(move || Ok(node.trusted().change(&add, &remove)?)).await?;
        Ok(changed.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_list_is_kept_and_damage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trust");
        let trusted = Trusted::open(&path).unwrap();
        let [a, b] = [PeerId::random(), PeerId::random()];
        assert_eq!(trusted.change(&[a, b], &[]).unwrap().len(), 2);
        trusted.change(&[], &[a]).unwrap();
        assert_eq!(Trusted::open(&path).unwrap().peers(), BTreeSet::from([b]));
        let many: Vec<_> = (0..=MAX_TRUSTED).map(|_| PeerId::random()).collect();
        assert!(trusted.change(&many, &[]).is_err());
        assert_eq!(Trusted::open(&path).unwrap().peers(), BTreeSet::from([b]));
        fs::write(&path, format!("{b}\nnobody\n")).unwrap();
        let error = Trusted::open(&path).unwrap_err().to_string();
        assert!(error.contains("nobody"), "{error}");
    }
}
