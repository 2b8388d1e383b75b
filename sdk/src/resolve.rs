//! The model that a name means, and the publisher that says so.
//!
//! This node's own word comes first, then the registries that it follows, then the DHT. A look-up in the DHT ends as
//! soon as its answer is sure enough: with the first answer that has a trusted publisher's record, or, while all claims
//! agree, with the second that has one of a connected publisher. The second answer is there so that no single node can
//! hide that another publisher claims the name too.
//!
//! A name that was resolved lately is confirmed by its publisher, which takes one round trip, and is looked up only if
//! the publisher is not connected, does not answer, or has withdrawn the name. Callers that resolve one name at a time
//! share a look-up.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex},
};

use prost::Message;
use tokio::time::{Duration, Instant};
use weft_blobs::Hash;
use weft_dht::Record;
use weft_net::PeerId;
use weft_proto::wire;

use crate::{Error, ModelName, Node, models::by_name, node::blocking};

/// Names that are remembered; beyond, the one that was not used for longest is forgotten.
const MAX_NAMES: usize = 1024;

/// Time for which a resolved name is remembered without being used.
const REMEMBER: Duration = Duration::from_secs(600);

/// Answers with a connected publisher's record that make it sure: see the module's comment.
const AGREEING: usize = 2;

/// A publisher's claim on a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Claim {
    publisher: PeerId,
    model: Hash,
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

/// Returns true if the claims found so far are sure enough to end a look-up; `answers` nodes have answered with any.
fn is_sure(
    claims: &[Claim],
    answers: usize,
    trusted: &BTreeSet<PeerId>,
    connected: &HashSet<PeerId>,
) -> bool {
    if answers == 0 {
        return false;
    }
    if claims
        .iter()
        .any(|claim| trusted.contains(&claim.publisher))
    {
        return true;
    }
    let agree = claims.windows(2).all(|two| two[0].model == two[1].model);
    answers >= AGREEING
        && agree
        && claims
            .iter()
            .any(|claim| connected.contains(&claim.publisher))
}

/// Returns the model that a name means, and the publisher that says so; `None` for a name that only this node
/// remembers. With `publisher`, only that publisher's word counts.
///
/// # Errors
/// [`Error::NoSuchName`], [`Error::SeveralPublishers`], [`Error::NotListed`], [`Error::Stopped`].
pub(crate) async fn resolve(
    node: &Node,
    name: &ModelName,
    publisher: Option<PeerId>,
) -> Result<(Hash, Option<PeerId>), Error> {
    let local = {
        let (store, name) = (node.store().clone(), name.clone());
        blocking(move || Ok(by_name(store.models()?, &name))).await?
    };
    let own = node.peer_id();
    if let Some(model) = &local
        && publisher.is_none_or(|publisher| publisher == own)
        && model
            .names
            .iter()
            .any(|known| known.published && known.name == name.to_string())
    {
        return Ok((model.id, Some(own)));
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
        })
        .collect();
    // A name that is reserved for a registry's publishers means what they say, unless somebody's own word is asked for.
    if let (true, None, Some(registry)) = (claims.is_empty(), publisher, listed.missing) {
        return Err(Error::NotListed {
            name: name.clone(),
            registry,
        });
    }
    // No other publisher states a name that a registry lists: so the name is known at once, and also while cut off from
    // all others.
    let trusted = node.trusted().peers();
    if claims.is_empty() && (publisher.is_some() || !listed.reserved) {
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
    match claims.as_slice() {
        // Several who agree are as good as one.
        [first, rest @ ..] if rest.iter().all(|other| other.model == first.model) => {
            Ok((first.model, Some(first.publisher)))
        }
        [] => match local {
            Some(model) if publisher.is_none() && !listed.reserved => Ok((model.id, None)),
            _ => Err(Error::NoSuchName {
                name: name.clone(),
                publisher,
            }),
        },
        _ => Err(Error::SeveralPublishers {
            name: name.clone(),
            publishers: claims
                .iter()
                .map(|claim| (claim.publisher, claim.model))
                .collect(),
        }),
    }
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
    let is_enough = move |records: &mut dyn Iterator<Item = &Record>, answers: usize| {
        is_sure(&claims_of(records), answers, &trusts, &sees)
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
        let heard = node.dht().seen(key, MAX_HEARD).await?;
        let others = heard.iter().filter(|record| record.key() == key);
        let mut others = others.filter_map(Claim::of);
        if others.any(|claim| claim.publisher != by) {
            return Ok(None);
        }
    }
    Ok(match ask(node, key, by).await? {
        Word::Says(claim) => claim,
        Word::Nothing => None,
    })
}

/// Records of this node's own store that are looked through for other claims on a name.
const MAX_HEARD: usize = 256;

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
        };
        let (nobody, set) = (BTreeSet::new(), BTreeSet::from([a]));
        let (alone, connected) = (HashSet::new(), HashSet::from([a]));
        // A trusted publisher's record, whether or not it is connected and others agree.
        assert!(is_sure(&[claim(a, 1), claim(b, 2)], 1, &set, &alone));
        assert!(!is_sure(&[claim(b, 2)], 9, &set, &alone));
        // This node's own store alone is not asked.
        assert!(!is_sure(&[claim(a, 1)], 0, &set, &connected));
        // A connected publisher's, if nobody contradicts it.
        assert!(is_sure(&[claim(a, 1)], 2, &nobody, &connected));
        assert!(is_sure(&[claim(a, 1), claim(b, 1)], 2, &nobody, &connected));
        assert!(!is_sure(
            &[claim(a, 1), claim(b, 2)],
            2,
            &nobody,
            &connected
        ));
        assert!(!is_sure(&[claim(a, 1)], 1, &nobody, &connected));
        assert!(!is_sure(&[claim(a, 1)], 9, &nobody, &alone));
        assert!(!is_sure(&[], 9, &set, &connected));
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
