//! Registries of models: publishers, the meaning of names for followers, the documents that followers hold, and private
//! registries.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use tokio::time::sleep;
use weft::{Error, Hash, NamePattern, NewRegistry, Node, PeerId, Registry, Target};
use weft_tests::{content::tiny_model, mesh, node};

const PATIENCE: Duration = Duration::from_secs(30);

async fn add(node: &Node, path: PathBuf, name: &str) -> (Hash, usize) {
    let add = node.models().add(path).name(name.parse().unwrap());
    let added = add.start().await.unwrap();
    (added.model.id, added.registries.len())
}

fn pattern(text: &str) -> NamePattern {
    text.parse().unwrap()
}

async fn names(registry: &Registry) -> Vec<String> {
    match registry.models("").await {
        Ok(models) => models.iter().map(|model| model.name.to_string()).collect(),
        Err(Error::Document(_)) => Vec::new(),
        Err(error) => panic!("{error}"),
    }
}

/// Waits until a registry lists exactly these names.
async fn lists(registry: &Registry, wanted: &[&str]) {
    let begin = Instant::now();
    loop {
        let names = names(registry).await;
        if names == wanted {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "{names:?}, not {wanted:?}");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until a node publishes names in the registry.
async fn publishes(registry: &Registry, peer: PeerId) {
    let begin = Instant::now();
    loop {
        let details = registry.info().await.unwrap().details;
        if details.is_some_and(|details| details.publishers.iter().any(|(who, _)| *who == peer)) {
            return;
        }
        assert!(begin.elapsed() < PATIENCE, "{peer} does not publish");
        sleep(Duration::from_millis(20)).await;
    }
}

/// Fetches a name to a folder of its own, and returns the model's id and publisher.
async fn get(node: &Node, name: &str) -> Result<(Hash, Option<PeerId>), Error> {
    let to = node.home().join("got").join(name.replace('/', "-"));
    let got = node.models().get(name.parse::<Target>().unwrap()).to(to);
    let got = got.start().await?;
    Ok((got.model.id, got.publisher))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_decides_the_meaning_of_names_and_strangers_do_not() {
    let (homes, hub, [owner, publisher, stranger, follower]) = mesh().await;
    let new = NewRegistry {
        label: "models".to_owned(),
        publishers: vec![
            (owner.peer_id(), NamePattern::all()),
            (publisher.peer_id(), pattern("acme/*")),
        ],
        ..NewRegistry::default()
    };
    let of_owner = owner.registries().create(new).await.unwrap();
    let id = of_owner.id();
    let of_publisher = publisher.registries().follow(id, "").await.unwrap();
    assert!(of_publisher.arrived(PATIENCE).await.unwrap());
    let folder = homes[0].path();
    let (tiny, listed) = add(
        &publisher,
        tiny_model(folder.join("tiny"), "{}"),
        "acme/tiny",
    )
    .await;
    assert_eq!(listed, 1);
    let (_, listed) = add(
        &publisher,
        tiny_model(folder.join("other"), "[]"),
        "other/tiny",
    )
    .await;
    assert_eq!(listed, 0, "the node may not publish such names");
    let of_stranger = stranger.registries().follow(id, "").await.unwrap();
    assert!(of_stranger.arrived(PATIENCE).await.unwrap());
    let false_model = tiny_model(folder.join("false"), "{\"false\": true}");
    let (false_one, listed) = add(&stranger, false_model, "acme/tiny").await;
    assert_eq!(listed, 0);
    let denied = of_stranger
        .publish(&"acme/tiny".parse().unwrap(), "acme/tiny")
        .await;
    assert!(
        matches!(denied, Err(Error::NotPublisher { .. })),
        "{:?}",
        denied.as_ref().err()
    );
    let denied = of_stranger
        .set_publishers(vec![(stranger.peer_id(), NamePattern::all())], Vec::new())
        .await;
    assert!(
        matches!(denied, Err(Error::NotAdministrator { .. })),
        "{:?}",
        denied.as_ref().err()
    );

    // A node that follows no registry finds two peers that contradict each other.
    let unsure = get(&hub, "acme/tiny").await;
    assert!(
        matches!(unsure, Err(Error::SeveralPublishers { .. })),
        "{unsure:?}"
    );
    let of_follower = follower.registries().follow(id, "").await.unwrap();
    lists(&of_follower, &["acme/tiny"]).await;
    let got = get(&follower, "acme/tiny").await.unwrap();
    assert_eq!(got, (tiny, Some(publisher.peer_id())));
    let listed = &of_follower.models("acme/").await.unwrap()[0];
    assert_eq!(
        (listed.model, listed.publisher),
        (tiny, publisher.peer_id())
    );
    assert_eq!(listed.files, [("config.json".to_owned(), 2)]);
    assert_eq!((listed.file_count, listed.shard_groups), (1, 1));
    let found = follower.models().search("acme/").await.unwrap();
    let claims = &found[0].claims;
    assert_eq!((claims[0].model, claims[0].trusted), (tiny, true));
    assert!(
        claims
            .iter()
            .all(|claim| claim.trusted == (claim.model != false_one))
    );

    // A new revision replaces the old one; a removed one is no longer listed.
    let (anew, _) = add(
        &publisher,
        tiny_model(folder.join("anew"), "{\"v\": 2}"),
        "acme/tiny",
    )
    .await;
    let begin = Instant::now();
    while of_follower.models("").await.unwrap()[0].model != anew {
        assert!(begin.elapsed() < PATIENCE, "the new revision is not listed");
        sleep(Duration::from_millis(20)).await;
    }
    let to_other = tiny_model(folder.join("of owner"), "7");
    let (of_all, _) = add(&owner, to_other, "misc/one@v1").await;
    lists(&of_follower, &["acme/tiny", "misc/one@v1"]).await;
    publisher
        .models()
        .remove(&anew.to_string(), false)
        .await
        .unwrap();
    lists(&of_follower, &["misc/one@v1"]).await;
    assert!(
        of_owner
            .withdraw(&"misc/one@v1".parse().unwrap())
            .await
            .unwrap()
    );
    assert!(
        !of_owner
            .withdraw(&"misc/one@v1".parse().unwrap())
            .await
            .unwrap()
    );
    lists(&of_follower, &[]).await;
    let again = "misc/two".parse().unwrap();
    of_owner.publish(&again, &of_all.to_string()).await.unwrap();
    lists(&of_follower, &["misc/two"]).await;

    // A former publisher has no say, whatever its catalogue contains.
    let former = vec![(owner.peer_id(), None)];
    let heir = vec![(stranger.peer_id(), pattern("acme/*"))];
    of_owner.set_publishers(heir, former).await.unwrap();
    lists(&of_follower, &[]).await;
    publishes(&of_stranger, stranger.peer_id()).await;
    of_stranger
        .publish(&"acme/tiny".parse().unwrap(), "acme/tiny")
        .await
        .unwrap();
    lists(&of_follower, &["acme/tiny"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_resolves_names_offline_and_holds_only_documents_within_its_prefix() {
    let (homes, hub, [a, b, c]) = mesh().await;
    let new = NewRegistry {
        publishers: vec![(a.peer_id(), pattern("a/*")), (b.peer_id(), pattern("b/*"))],
        ..NewRegistry::default()
    };
    let of_a = a.registries().create(new).await.unwrap();
    let id = of_a.id();
    let of_b = b.registries().follow(id, "").await.unwrap();
    assert!(of_b.arrived(PATIENCE).await.unwrap());
    let peer_a = a.peer_id();
    let (model_a, _) = add(&a, tiny_model(homes[0].path().join("a"), "1"), "a/one").await;
    add(&b, tiny_model(homes[0].path().join("b"), "2"), "b/one").await;
    let of_c = c.registries().follow(id, "").await.unwrap();
    lists(&of_c, &["a/one", "b/one"]).await;
    assert_eq!(c.docs().list().await.unwrap().len(), 3);
    // With a narrower prefix, documents without matching names are dropped.
    c.registries().follow(id, "a/").await.unwrap();
    lists(&of_c, &["a/one"]).await;
    let begin = Instant::now();
    while c.docs().list().await.unwrap().len() != 2 {
        assert!(
            begin.elapsed() < PATIENCE,
            "the node still holds documents outside its prefix"
        );
        sleep(Duration::from_millis(20)).await;
    }
    let details = of_c.info().await.unwrap().details.unwrap();
    assert_eq!(
        (details.catalogues, details.catalogues_here, details.names),
        (1, 1, 1)
    );
    let wrong = c.registries().follow(id, "no name").await;
    assert!(matches!(wrong, Err(Error::Pattern(_))), "{wrong:?}");

    // After a restart, without any other node. This node stops first, so it does not learn that the others no longer
    // provide anything. The unreachable node then is the provider of the name's model.
    for node in [&c, &a, &b, &hub] {
        node.shutdown().await;
    }
    drop((of_a, of_b, of_c, a, b, hub, c));
    let c = node(homes[3].path(), &[]).await;
    let registries = c.registries().list().await.unwrap();
    assert_eq!((registries[0].id, &registries[0].prefix[..]), (id, "a/"));
    let of_c = c.registries().followed(id).unwrap();
    assert_eq!(names(&of_c).await, ["a/one"]);
    let no_provider = get(&c, "a/one").await;
    let Err(Error::NoProvider { model, failures }) = no_provider else {
        panic!("{no_provider:?}");
    };
    assert_eq!(model, model_a);
    assert_eq!(failures[0].peer, peer_a);
    assert!(c.registries().unfollow(id).await.unwrap());
    assert!(!c.registries().unfollow(id).await.unwrap());
    assert!(matches!(of_c.info().await, Err(Error::NotFollowed(_))));
    let begin = Instant::now();
    while !c.docs().list().await.unwrap().is_empty() {
        assert!(
            begin.elapsed() < PATIENCE,
            "the node still holds documents that it does not follow"
        );
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_readers_of_a_private_registry_read_it_and_its_catalogues() {
    let (homes, _hub, [owner, publisher, stranger]) = mesh().await;
    let new = NewRegistry {
        publishers: vec![(publisher.peer_id(), NamePattern::all())],
        readers: Some(vec![publisher.peer_id()]),
        ..NewRegistry::default()
    };
    let of_owner = owner.registries().create(new).await.unwrap();
    let of_publisher = publisher
        .registries()
        .follow(of_owner.id(), "")
        .await
        .unwrap();
    assert!(of_publisher.arrived(PATIENCE).await.unwrap());
    add(
        &publisher,
        tiny_model(homes[0].path().join("secret"), "1"),
        "acme/secret",
    )
    .await;
    lists(&of_owner, &["acme/secret"]).await;
    let of_stranger = stranger
        .registries()
        .follow(of_owner.id(), "")
        .await
        .unwrap();
    // The catalogue's id is no secret, but its content is.
    let held = publisher.docs().list().await.unwrap();
    let catalogue = held.iter().find(|one| one.id != of_owner.id()).unwrap();
    let opened = stranger.docs().open(catalogue.id).await.unwrap();
    // A public document arrives from both holders, so a private one would have arrived too.
    for holder in [&owner, &publisher] {
        let public = holder.docs().create(weft::NewDoc::default()).await.unwrap();
        public.put("/a", 1).await.unwrap();
        let public = stranger.docs().open(public.id()).await.unwrap();
        assert!(public.arrived(PATIENCE).await.unwrap());
    }
    assert!(!of_stranger.arrived(Duration::from_secs(2)).await.unwrap());
    assert!(!opened.arrived(Duration::from_secs(2)).await.unwrap());
    // A document that is no registry is not followed.
    let other = stranger
        .docs()
        .create(weft::NewDoc::default())
        .await
        .unwrap();
    other.put("/a", 1).await.unwrap();
    let wrong = stranger.registries().follow(other.id(), "").await;
    assert!(matches!(wrong, Err(Error::NotRegistry(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reserved_name_has_no_meaning_until_its_publisher_lists_it() {
    let (homes, hub, [owner, publisher, stranger]) = mesh().await;
    let new = NewRegistry {
        publishers: vec![(publisher.peer_id(), pattern("acme/*"))],
        ..NewRegistry::default()
    };
    let of_owner = owner.registries().create(new).await.unwrap();
    let (false_one, _) = add(
        &stranger,
        tiny_model(homes[0].path().join("f"), "f"),
        "acme/tiny",
    )
    .await;
    add(
        &stranger,
        tiny_model(homes[0].path().join("g"), "g"),
        "free/tiny",
    )
    .await;
    // The publisher has not seen the registry, so no node has its catalogue.
    let nothing = get(&owner, "acme/tiny").await;
    assert!(
        matches!(nothing, Err(Error::NotListed { registry, .. }) if registry == of_owner.id()),
        "{:?}",
        nothing.err()
    );
    // Unreserved names are resolved by the DHT, and so are all names for nodes that follow no registry. A publisher
    // that the user names is believed.
    get(&owner, "free/tiny").await.unwrap();
    assert_eq!(get(&hub, "acme/tiny").await.unwrap().0, false_one);
    let asked = owner.models().get("acme/tiny".parse::<Target>().unwrap());
    let asked = asked
        .publisher(stranger.peer_id())
        .to(owner.home().join("asked"));
    assert_eq!(asked.start().await.unwrap().model.id, false_one);
    // Once the catalogue is here and does not list the name, the name still means nothing.
    let of_publisher = publisher
        .registries()
        .follow(of_owner.id(), "")
        .await
        .unwrap();
    assert!(of_publisher.arrived(PATIENCE).await.unwrap());
    let (tiny, _) = add(
        &publisher,
        tiny_model(homes[0].path().join("t"), "t"),
        "acme/other",
    )
    .await;
    lists(&of_owner, &["acme/other"]).await;
    assert_eq!(get(&owner, "acme/other").await.unwrap().0, tiny);
    let none = get(&owner, "acme/small").await;
    assert!(
        matches!(none, Err(Error::NotListed { registry, .. }) if registry == of_owner.id()),
        "{:?}",
        none.err()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publisher_that_lost_its_documents_gets_its_catalogue_back() {
    let (homes, hub, [owner, publisher]) = mesh().await;
    let new = NewRegistry {
        publishers: vec![(publisher.peer_id(), NamePattern::all())],
        readers: Some(vec![publisher.peer_id()]),
        ..NewRegistry::default()
    };
    let of_owner = owner.registries().create(new).await.unwrap();
    let of_publisher = publisher
        .registries()
        .follow(of_owner.id(), "")
        .await
        .unwrap();
    assert!(of_publisher.arrived(PATIENCE).await.unwrap());
    add(
        &publisher,
        tiny_model(homes[0].path().join("a"), "1"),
        "acme/a",
    )
    .await;
    add(
        &publisher,
        tiny_model(homes[0].path().join("b"), "2"),
        "acme/b",
    )
    .await;
    lists(&of_owner, &["acme/a", "acme/b"]).await;
    publisher.shutdown().await;
    drop((of_publisher, publisher));
    std::fs::remove_file(homes[2].path().join("documents.redb")).unwrap();
    let publisher = node(homes[2].path(), &hub.addresses().await).await;
    let of_publisher = publisher.registries().followed(of_owner.id()).unwrap();
    assert!(of_publisher.arrived(PATIENCE).await.unwrap());
    let (anew, _) = add(
        &publisher,
        tiny_model(homes[0].path().join("c"), "3"),
        "acme/b",
    )
    .await;
    add(
        &publisher,
        tiny_model(homes[0].path().join("d"), "4"),
        "acme/d",
    )
    .await;
    lists(&of_owner, &["acme/a", "acme/b", "acme/d"]).await;
    lists(&of_publisher, &["acme/a", "acme/b", "acme/d"]).await;
    let listed = of_owner.models("acme/b").await.unwrap();
    assert_eq!(listed[0].model, anew);
}
