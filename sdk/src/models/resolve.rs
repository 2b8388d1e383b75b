//! Resolution of a model name: which model it leads to, and whose claim decides.
//!
//! This node's own claim comes first, then the registries that it follows, then the DHT. A lookup in the DHT ends
//! early in two cases:
//!
//! - A trusted publisher is connected. Its record ends the lookup at once, and the publisher is asked for its latest
//!   claim.
//! - All nodes that answer promptly have been heard, so that neither an old record nor a single node that hides a
//!   claim decides. Late nodes are not waited for if a trusted or a connected publisher claims the name and no
//!   untrusted publisher contradicts it.
//!
//! A name that was resolved recently is confirmed by its publisher, which takes one round trip. The name is looked up
//! again if the publisher is not connected, does not answer or has withdrawn it. It is also looked up again once a
//! minute, because another publisher may claim it too. Callers that resolve the same name share a lookup.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex},
};

use prost::Message;
use tokio::time::{Duration, Instant};
use weft_blobs::{Hash, hf_cache::Commit};
use weft_dht::{Progress, Record};
use weft_net::PeerId;
use weft_proto::wire;

use crate::{Error, ModelName, Node, models::by_name, operation::blocking};

/// The most names that are remembered. Above this, the name that was used least recently is forgotten.
const MAX_NAMES: usize = 1024;

/// Time for which a resolved name is remembered without being used.
const REMEMBER_TIME: Duration = Duration::from_secs(600);

/// Age at which a name is looked up again although its publisher confirms it. Another publisher's claim may be missed
/// for this long.
const LOOKUP_INTERVAL: Duration = Duration::from_secs(60);

/// A publisher's claim to a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Claim {
    publisher: PeerId,
    model: Hash,
    /// The commit of the hub that the model is a cache's part of.
    commit: Option<Commit>,
}

/// The result of resolving a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Meaning {
    pub(crate) model: Hash,
    /// The publisher whose claim decided; `None` for a name that only this node remembers.
    pub(crate) publisher: Option<PeerId>,
    /// All models that are claimed for one commit of the hub, each with a publisher, the chosen one first. Each is
    /// the part of the commit that a publisher's cache holds. Empty if there is only one model.
    pub(crate) parts: Vec<(Hash, PeerId)>,
}

impl Meaning {
    fn one(model: Hash, publisher: Option<PeerId>) -> Self {
        Self {
            model,
            publisher,
            parts: Vec::new(),
        }
    }

    /// Combines claims that differ only in which part of a commit they are for. Returns `None` if they differ in
    /// more, or if there are none.
    fn of(claims: &[Claim]) -> Option<Self> {
        let first = claims.first()?;
        // Publishers that agree count as one.
        if claims.iter().all(|claim| claim.model == first.model) {
            return Some(Self::one(first.model, Some(first.publisher)));
        }
        first.commit?;
        if claims.iter().any(|claim| claim.commit != first.commit) {
            return None;
        }
        let mut parts: Vec<(Hash, PeerId)> = Vec::new();
        for claim in claims {
            if !parts.iter().any(|(model, _)| *model == claim.model) {
                parts.push((claim.model, claim.publisher));
            }
        }
        parts.sort_by_key(|(model, _)| *model);
        let (model, publisher) = *parts.first()?;
        Some(Self {
            model,
            publisher: Some(publisher),
            parts,
        })
    }
}

impl Claim {
    /// Returns the claim in a record; `None` if the record is withdrawn or malformed.
    fn of(record: &Record) -> Option<Self> {
        if !record.subkey().is_empty() {
            return None;
        }
        let claim = wire::NameClaim::decode(record.value()?).ok()?;
        Some(Self {
            publisher: record.publisher(),
            model: Hash::from_slice(&claim.manifest)?,
            commit: Commit::from_slice(&claim.commit),
        })
    }
}

/// The question of a lookup: the name's key, and the only accepted publisher, if any.
type Question = (Vec<u8>, Option<PeerId>);

/// The resolution of a name, and the publishers that were trusted at that time.
#[derive(Debug)]
struct Known {
    claim: Claim,
    trusted: BTreeSet<PeerId>,
    /// Time of the last lookup.
    looked: Instant,
}

#[derive(Debug)]
struct Slot {
    /// Held by the task that resolves the name.
    known: Arc<tokio::sync::Mutex<Option<Known>>>,
    used: Instant,
}

/// The names that were resolved recently. All users of the node share them, because commands and API clients come and
/// go.
#[derive(Debug, Default)]
pub(crate) struct Resolved(Mutex<HashMap<Question, Slot>>);

impl Resolved {
    fn slot(&self, question: Question) -> Arc<tokio::sync::Mutex<Option<Known>>> {
        let now = Instant::now();
        let mut slots = self
            .0
            .lock()
            .expect("nothing panics while holding the lock");
        slots.retain(|_, slot| now.duration_since(slot.used) < REMEMBER_TIME);
        if slots.len() >= MAX_NAMES
            && !slots.contains_key(&question)
            && let Some(oldest) = slots.iter().min_by_key(|(_, slot)| slot.used)
        {
            let oldest = oldest.0.clone();
            slots.remove(&oldest);
        }
        let slot = slots.entry(question).or_insert_with(|| Slot {
            known: Arc::default(),
            used: now,
        });
        slot.used = now;
        Arc::clone(&slot.known)
    }
}

/// Returns true if the claims found so far are certain enough to end a lookup.
fn is_sure(
    claims: &[Claim],
    progress: Progress,
    trusted: &BTreeSet<PeerId>,
    connected: &HashSet<PeerId>,
) -> bool {
    if progress.answers == 0 {
        return false;
    }
    let mut of_trusted = claims
        .iter()
        .filter(|claim| trusted.contains(&claim.publisher))
        .peekable();
    if of_trusted.peek().is_some() {
        return progress.settled || of_trusted.any(|claim| connected.contains(&claim.publisher));
    }
    let agree = claims.windows(2).all(|two| two[0].model == two[1].model);
    let seen = |claim: &Claim| connected.contains(&claim.publisher);
    progress.settled && agree && claims.iter().any(seen)
}

/// Resolves a name. With `publisher`, only that publisher's claim counts.
///
/// # Errors
/// [`Error::NoSuchName`], or [`Error::Disconnected`] if there is no peer to ask; [`Error::SeveralPublishers`];
/// [`Error::NotListed`]; [`Error::Stopped`] after a shutdown.
pub(crate) async fn resolve(
    node: &Node,
    name: &ModelName,
    publisher: Option<PeerId>,
) -> Result<Meaning, Error> {
    let local = {
        let (store, name) = (node.store().clone(), name.clone());
        blocking(move || Ok(by_name(store.models()?, &name))).await?
    };
    let own = node.peer_id();
    if let Some(model) = &local
        && publisher.is_none_or(|publisher| publisher == own)
        && let Some(known) = model
            .names
            .iter()
            .find(|known| known.published && known.name == name.to_string())
    {
        let claim = Claim {
            publisher: own,
            model: model.id,
            commit: known.commit,
        };
        return with_other_parts(node, name, claim, publisher).await;
    }
    let is_asked = |peer: PeerId| publisher.is_none_or(|publisher| publisher == peer);
    let listed = node.registries().resolve(name).await?;
    let mut claims: Vec<Claim> = listed
        .models
        .iter()
        .filter(|one| is_asked(one.publisher))
        .map(|one| Claim {
            publisher: one.publisher,
            model: one.model,
            commit: one.commit,
        })
        .collect();
    // A name that a registry reserves is resolved by its publishers alone, unless a publisher was given.
    if let (true, None, Some(registry)) = (
        claims.is_empty(),
        publisher,
        listed.missing.or(listed.reserved),
    ) {
        return Err(Error::NotListed {
            name: name.clone(),
            registry,
        });
    }
    // Other publishers' claims do not count for a name that a registry lists. The name is therefore resolved at once,
    // even without a connection.
    let trusted = node.trusted().peers();
    if claims.is_empty() && (publisher.is_some() || listed.reserved.is_none()) {
        node.meet().await;
        claims = in_mesh(node, name, publisher, &trusted).await?;
    }
    // Claims of trusted publishers win over all others.
    let of_trusted = claims
        .iter()
        .filter(|claim| trusted.contains(&claim.publisher));
    let of_trusted: Vec<_> = of_trusted.copied().collect();
    let claims = if of_trusted.is_empty() {
        claims
    } else {
        of_trusted
    };
    match Meaning::of(&claims) {
        Some(meaning) => Ok(meaning),
        None if claims.is_empty() => match local {
            Some(model) if publisher.is_none() => Ok(Meaning::one(model.id, None)),
            _ => {
                let name = name.clone();
                Err(node.not_found(Error::NoSuchName { name, publisher }).await)
            }
        },
        None => Err(Error::SeveralPublishers {
            name: name.clone(),
            publishers: claims
                .iter()
                .map(|claim| (claim.publisher, claim.model))
                .collect(),
        }),
    }
}

/// Resolves a name that this node publishes: its own model, and further parts of the same commit of the hub from
/// connected peers, because this node's cache may hold only a part of it.
async fn with_other_parts(
    node: &Node,
    name: &ModelName,
    own: Claim,
    publisher: Option<PeerId>,
) -> Result<Meaning, Error> {
    let mut claims = vec![own];
    let is_alone = node.network().peers().await.is_empty();
    if own.commit.is_some() && publisher.is_none() && !is_alone {
        let trusted = node.trusted().peers();
        let others = in_mesh(node, name, None, &trusted).await?;
        claims.extend(
            others
                .into_iter()
                .filter(|claim| claim.commit == own.commit),
        );
    }
    Ok(Meaning::of(&claims).unwrap_or(Meaning::one(own.model, Some(own.publisher))))
}

/// Returns the claims to a name of publishers in the mesh.
async fn in_mesh(
    node: &Node,
    name: &ModelName,
    publisher: Option<PeerId>,
    trusted: &BTreeSet<PeerId>,
) -> Result<Vec<Claim>, Error> {
    let key = name.record_key();
    let slot = node.resolved().slot((key.clone(), publisher));
    let mut known = slot.lock().await;
    let peers = node.network().peers().await;
    let connected: HashSet<PeerId> = peers.iter().map(|info| info.peer).collect();
    if let Some(before) = known.take_if(|before| before.trusted == *trusted)
        && before.looked.elapsed() < LOOKUP_INTERVAL
        && connected.contains(&before.claim.publisher)
        && let Some(claim) = confirm(node, &key, before.claim.publisher, publisher, trusted).await?
    {
        *known = Some(Known { claim, ..before });
        return Ok(vec![claim]);
    }
    *known = None;
    let is_asked = move |claim: &Claim| publisher.is_none_or(|peer| peer == claim.publisher);
    let claims_of = move |records: &mut dyn Iterator<Item = &Record>| -> Vec<Claim> {
        records.filter_map(Claim::of).filter(is_asked).collect()
    };
    let (trusts, sees) = (trusted.clone(), connected.clone());
    let is_enough = move |records: &mut dyn Iterator<Item = &Record>, progress: Progress| {
        is_sure(&claims_of(records), progress, &trusts, &sees)
    };
    let records = node.dht().get_until(&key, is_enough).await?;
    let mut claims = claims_of(&mut records.iter());
    // The nodes that were asked may lack the latest claim; the publisher does not.
    let first = claims
        .iter()
        .find(|claim| trusted.contains(&claim.publisher))
        .or(claims.first())
        .copied();
    if let Some(first) = first
        && connected.contains(&first.publisher)
        && let Word::Says(latest) = ask(node, &key, first.publisher).await?
    {
        claims.retain(|claim| claim.publisher != first.publisher);
        claims.extend(latest);
    }
    let of_trusted = |claim: &&Claim| trusted.contains(&claim.publisher);
    let sure = claims.iter().find(of_trusted).or(match &claims[..] {
        [only] => Some(only),
        _ => None,
    });
    *known = sure.map(|claim| Known {
        claim: *claim,
        trusted: trusted.clone(),
        looked: Instant::now(),
    });
    Ok(claims)
}

/// A publisher's answer about a name.
enum Word {
    /// The publisher claims the name for this model, or has withdrawn its claim.
    Says(Option<Claim>),
    /// The publisher does not answer, or has no record of the name.
    Nothing,
}

async fn ask(node: &Node, key: &[u8], publisher: PeerId) -> Result<Word, Error> {
    let records = node.dht().ask(publisher, key).await?;
    let own = |record: &&Record| record.publisher() == publisher && record.subkey().is_empty();
    Ok(match records.iter().find(own) {
        Some(record) => Word::Says(Claim::of(record)),
        None => Word::Nothing,
    })
}

/// Asks a connected publisher whether it still claims a name. Returns its claim, or `None` if the name has to be
/// looked up.
async fn confirm(
    node: &Node,
    key: &[u8],
    by: PeerId,
    asked: Option<PeerId>,
    trusted: &BTreeSet<PeerId>,
) -> Result<Option<Claim>, Error> {
    // This node may have received another claim since. That does not matter if only one publisher's claim counts.
    if asked.is_none() && !trusted.contains(&by) {
        let heard = node.dht().ask(node.peer_id(), key).await?;
        let mut others = heard.iter().filter_map(Claim::of);
        if others.any(|claim| claim.publisher != by) {
            return Ok(None);
        }
    }
    Ok(match ask(node, key, by).await? {
        Word::Says(claim) => claim,
        Word::Nothing => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lookup_ends_early_only_when_its_answer_is_certain() {
        let (a, b) = (PeerId::random(), PeerId::random());
        let model = |n: u8| Hash::of(&[n]);
        let claim = |publisher, n| Claim {
            publisher,
            model: model(n),
            commit: None,
        };
        let (nobody, set) = (BTreeSet::new(), BTreeSet::from([a]));
        let (alone, connected) = (HashSet::new(), HashSet::from([a]));
        let at = |answers, settled| Progress { answers, settled };
        let both = [claim(a, 1), claim(b, 2)];
        // A trusted publisher's record: at once if the publisher can be asked for its latest, otherwise after all
        // prompt answers.
        assert!(is_sure(&both, at(1, false), &set, &connected));
        assert!(!is_sure(&both, at(1, false), &set, &alone));
        assert!(is_sure(&both, at(1, true), &set, &alone));
        assert!(!is_sure(&both[1..], at(9, true), &set, &alone));
        // This node's own store alone is not enough.
        assert!(!is_sure(&both, at(0, true), &set, &connected));
        // A connected publisher's record, if no other contradicts it.
        let same = [claim(a, 1), claim(b, 1)];
        assert!(is_sure(&same[..1], at(1, true), &nobody, &connected));
        assert!(is_sure(&same, at(2, true), &nobody, &connected));
        assert!(!is_sure(&same, at(9, false), &nobody, &connected));
        assert!(!is_sure(&both, at(2, true), &nobody, &connected));
        assert!(!is_sure(&same, at(9, true), &nobody, &alone));
        assert!(!is_sure(&[], at(9, true), &set, &connected));
    }

    #[test]
    fn publishers_of_parts_of_one_commit_do_not_contradict_each_other() {
        let (a, b, c) = (PeerId::random(), PeerId::random(), PeerId::random());
        let commit = |n: u8| Some(Commit::of_model(&Hash::of(&[n])));
        let claim = |publisher, n: u8, commit| Claim {
            publisher,
            model: Hash::of(&[n]),
            commit,
        };
        let parts = [
            claim(a, 1, commit(9)),
            claim(b, 2, commit(9)),
            claim(c, 2, commit(9)),
        ];
        let meaning = Meaning::of(&parts).unwrap();
        assert_eq!(meaning.parts.len(), 2);
        assert_eq!(
            (meaning.model, meaning.publisher),
            (meaning.parts[0].0, Some(meaning.parts[0].1))
        );
        // The same in whatever order the claims arrive.
        let turned: Vec<_> = parts.iter().rev().copied().collect();
        assert_eq!(Meaning::of(&turned).unwrap().model, meaning.model);
        // Another commit, or none: the publishers mean different models by the name.
        assert_eq!(Meaning::of(&[parts[0], claim(b, 2, commit(8))]), None);
        assert_eq!(Meaning::of(&[parts[0], claim(b, 2, None)]), None);
        assert_eq!(Meaning::of(&[claim(a, 1, None), claim(b, 2, None)]), None);
        // Agreement needs no commit.
        let agree = Meaning::of(&[claim(a, 1, None), claim(b, 1, commit(9))]).unwrap();
        assert!(agree.parts.is_empty());
        assert_eq!(Meaning::of(&[]), None);
    }

    #[tokio::test(start_paused = true)]
    async fn remembered_names_are_bounded_and_forgotten_in_time() {
        let resolved = Resolved::default();
        let count = || resolved.0.lock().unwrap().len();
        for n in 0..2 * MAX_NAMES {
            resolved.slot((n.to_le_bytes().to_vec(), None));
        }
        assert_eq!(count(), MAX_NAMES);
        tokio::time::advance(REMEMBER_TIME).await;
        resolved.slot((Vec::new(), None));
        assert_eq!(count(), 1);
    }
}
