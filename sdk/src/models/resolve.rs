//! Decides which model a name means, and which publisher says so.
//!
//! This node's own word comes first, then the registries that it follows, then the DHT. A look-up in the DHT ends
//! early in two cases. A trusted publisher that is connected has the word: its record ends the look-up at once, and it
//! is asked for its latest. Otherwise all nodes that answer promptly are heard, so that neither an old record nor a
//! single node that hides a claim decides; nodes that are late are not waited for if a trusted or a connected
//! publisher claims the name and, among those who are not trusted, nobody contradicts it.
//!
//! A name that was resolved lately is confirmed by its publisher, which takes one round trip. It is looked up again if
//! the publisher is not connected, does not answer or has withdrawn the name, and once a minute, for another publisher
//! may claim it too. Callers that resolve one name at a time share a look-up.

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

/// Names that are remembered; beyond, the one that was not used for longest is forgotten.
const MAX_NAMES: usize = 1024;

/// Time for which a resolved name is remembered without being used.
const REMEMBER: Duration = Duration::from_secs(600);

/// A name is looked up again after this time, although its publisher confirms it: so long may another publisher's
/// claim be missed.
const LOOK: Duration = Duration::from_secs(60);

/// A publisher's claim on a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Claim {
    publisher: PeerId,
    model: Hash,
    /// The commit on the hub that the model is what a cache holds of.
    commit: Option<Commit>,
}

/// The meaning of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Meaning {
    pub(crate) model: Hash,
    /// The publisher that says so; `None` for a name that only this node remembers.
    pub(crate) publisher: Option<PeerId>,
    /// All models that are claimed for one commit of the hub, each with a publisher, the one above first; empty if
    /// there is just one. Each is what somebody's cache holds of the commit.
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

    /// Combines claims that contradict each other in nothing but which part of a commit they have. Returns `None` if
    /// they differ in more, or if there are none.
    fn of(claims: &[Claim]) -> Option<Self> {
        let first = claims.first()?;
        // Several who agree are as good as one.
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
    /// Returns the claim of a record, if it is a claim that holds.
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

/// The question of a look-up: a name's key, and the publisher that was asked for.
type Question = (Vec<u8>, Option<PeerId>);

/// The resolution of a name, and the publishers that were trusted at that time.
#[derive(Debug)]
struct Known {
    claim: Claim,
    trusted: BTreeSet<PeerId>,
    /// Time of the last look-up.
    looked: Instant,
}

#[derive(Debug)]
struct Slot {
    /// Held by whoever resolves the name.
    known: Arc<tokio::sync::Mutex<Option<Known>>>,
    used: Instant,
}

/// Names that were resolved lately, for all who use the node: commands and API clients come and go.
#[derive(Debug, Default)]
pub(crate) struct Resolved(Mutex<HashMap<Question, Slot>>);

impl Resolved {
    fn slot(&self, question: Question) -> Arc<tokio::sync::Mutex<Option<Known>>> {
        let now = Instant::now();
        let mut slots = self
            .0
            .lock()
            .expect("nothing panics while holding the lock");
        slots.retain(|_, slot| now.duration_since(slot.used) < REMEMBER);
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

/// Returns true if the claims found so far are sure enough to end a look-up.
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

/// Returns what a name means. With `publisher`, only that publisher's word counts.
///
/// # Errors
/// [`Error::NoSuchName`], or [`Error::Disconnected`] if there is nobody to ask; [`Error::SeveralPublishers`],
/// [`Error::NotListed`], [`Error::Stopped`].
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
    // A name that is reserved for a registry's publishers means what they say, unless somebody's own word is asked for.
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
    // No other publisher states a name that a registry lists: so the name is known at once, and also while cut off from
    // all others.
    let trusted = node.trusted().peers();
    if claims.is_empty() && (publisher.is_some() || listed.reserved.is_none()) {
        node.meet().await;
        claims = in_mesh(node, name, publisher, &trusted).await?;
    }
    // Those who are trusted have the word, if they say anything.
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

/// Returns what a name means that this node publishes: its own word, and what connected machines add to it if it is of
/// a commit of the hub, of which this node's cache may have a part only.
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

/// Returns the claims of publishers in the mesh on a name.
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
        && before.looked.elapsed() < LOOK
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
    // A node that was asked may have missed the latest word; the publisher has not.
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
    /// It claims the name for this model, or has withdrawn it.
    Says(Option<Claim>),
    /// It does not answer, or knows nothing.
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

/// The connected publisher's latest word on a name that it was found to claim; `None` if that has to be looked up.
async fn confirm(
    node: &Node,
    key: &[u8],
    by: PeerId,
    asked: Option<PeerId>,
    trusted: &BTreeSet<PeerId>,
) -> Result<Option<Claim>, Error> {
    // This node may have heard of another claim since; unless one publisher's word is what counts.
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
    fn a_look_up_ends_early_only_when_its_answer_is_sure() {
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
        // A trusted publisher's record: at once if it can be asked for its latest, else when the prompt have answered.
        assert!(is_sure(&both, at(1, false), &set, &connected));
        assert!(!is_sure(&both, at(1, false), &set, &alone));
        assert!(is_sure(&both, at(1, true), &set, &alone));
        assert!(!is_sure(&both[1..], at(9, true), &set, &alone));
        // This node's own store alone is not enough.
        assert!(!is_sure(&both, at(0, true), &set, &connected));
        // A connected publisher's, if nobody contradicts it.
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
        // The same whatever order the claims come in.
        let turned: Vec<_> = parts.iter().rev().copied().collect();
        assert_eq!(Meaning::of(&turned).unwrap().model, meaning.model);
        // Another commit, or none: they mean different things by the name.
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
        tokio::time::advance(REMEMBER).await;
        resolved.slot((Vec::new(), None));
        assert_eq!(count(), 1);
    }
}
