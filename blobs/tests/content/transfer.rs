//! Whole transfers between two stores over an in-memory pipe.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::Path,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use weft_blobs::{
    Hash, Manifest, Plan, PlanError, Store, Transfer, TransferError,
    arrivals::Arrivals,
    index::{self, index},
    plan::Progress,
    rate::Limit,
    serve::{ServeError, serve, serve_in_turn},
    transfer::fetch_manifest,
    uplink::Uplink,
};
use weft_proto::{
    frame,
    wire::{BlobRequest, BlobResponse, blob_response::Status},
};

const GROUP: usize = 64 * 1024;

fn content(size: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    (0..size)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        })
        .collect()
}

fn write(root: &Path, path: &str, data: &[u8]) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, data).unwrap();
}

/// A download of a model from one provider after another.
struct Download {
    plan: Plan,
    transfer: Transfer,
}

impl Download {
    fn plan(
        store: &Store,
        manifest: &Manifest,
        root: &Path,
        progress: Arc<Progress>,
    ) -> Result<Self, PlanError> {
        let transfer = Transfer::new(store, manifest, Arc::clone(&progress), 1);
        let plan = Plan::new(store, manifest, None, root, progress)?;
        Ok(Self { plan, transfer })
    }

    fn is_complete(&self) -> bool {
        self.plan.is_complete()
    }

    fn root(&self) -> &Path {
        self.plan.root()
    }

    async fn fetch(&mut self, stream: DuplexStream) -> Result<(), TransferError> {
        let peer = self.transfer.join(false, None);
        peer.has_all();
        let result = async {
            let run = self.transfer.run(&mut self.plan);
            let fetch = self.transfer.fetch(&peer, stream, &[]);
            tokio::pin!(run, fetch);
            tokio::select! {
                result = &mut run => Ok(result?),
                result = &mut fetch => {
                    result?;
                    Ok(run.await?)
                }
            }
        };
        let result: Result<(), TransferError> = result.await;
        self.transfer.settle().await?;
        result?;
        self.plan.finish_copies().await?;
        Ok(())
    }
}

struct World {
    home: tempfile::TempDir,
    provider: Store,
    receiver: Store,
    manifest: Manifest,
    id: Hash,
}

impl World {
    fn new(files: &[(&str, Vec<u8>)]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let source = home.path().join("source");
        for (path, data) in files {
            write(&source, path, data);
        }
        let provider = Store::open(&home.path().join("provider")).unwrap();
        let indexed = index(&source, &index::Progress::default()).unwrap();
        let id = provider.add(&indexed, None).unwrap();
        let receiver = Store::open(&home.path().join("receiver")).unwrap();
        Self {
            home,
            provider,
            receiver,
            manifest: indexed.manifest,
            id,
        }
    }

    fn path(&self, path: &str) -> std::path::PathBuf {
        self.home.path().join(path)
    }

    fn connect(&self) -> DuplexStream {
        let (near, far) = duplex(256 * 1024);
        let store = self.provider.clone();
        tokio::spawn(async move { serve(store, far, &[]).await });
        near
    }

    fn plan(&self, to: &str) -> Result<(Download, Arc<Progress>), PlanError> {
        let progress = Arc::new(Progress::default());
        let download = Download::plan(
            &self.receiver,
            &self.manifest,
            &self.path(to),
            Arc::clone(&progress),
        )?;
        Ok((download, progress))
    }

    fn assert_equal(&self, to: &str) {
        for file in self.manifest.files() {
            let want = fs::read(self.path("source").join(&file.path)).unwrap();
            let got = fs::read(self.path(to).join(&file.path)).unwrap();
            assert!(want == got, "{} differs", file.path);
        }
        assert_no_leftovers(&self.path(to));
    }
}

fn assert_no_leftovers(folder: &Path) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        assert!(!name.starts_with(".weft-"), "{name} is left over");
        if entry.file_type().unwrap().is_dir() {
            assert_no_leftovers(&entry.path());
        }
    }
}

fn moved(progress: &Progress) -> u64 {
    progress.moved.load(Ordering::Relaxed)
}

#[tokio::test]
async fn every_shape_of_file_arrives_whole_and_a_second_plan_moves_nothing() {
    let sizes = [
        0,
        1,
        GROUP - 1,
        GROUP,
        GROUP + 1,
        3 * GROUP,
        40 * GROUP + 123,
        300 * GROUP,
    ];
    let names: Vec<String> = sizes.iter().map(|size| format!("d{size}/f")).collect();
    let files: Vec<_> = names
        .iter()
        .zip(sizes)
        .map(|(name, size)| (name.as_str(), content(size, size as u64)))
        .collect();
    let world = World::new(&files);
    let manifest = fetch_manifest(world.connect(), world.id, &Arrivals::default())
        .await
        .unwrap();
    assert_eq!(Manifest::decode(&manifest).unwrap(), world.manifest);
    let (mut download, progress) = world.plan("to").unwrap();
    assert!(!download.is_complete());
    download.fetch(world.connect()).await.unwrap();
    assert!(download.is_complete());
    world.assert_equal("to");
    assert_eq!(moved(&progress), world.manifest.size());
    // A blob is counted just after it is renamed into place, so the count may lag behind.
    until("all bytes are counted", || {
        progress.done.load(Ordering::Relaxed) == world.manifest.size()
    })
    .await;

    let (download, progress) = world.plan("to").unwrap();
    assert!(download.is_complete());
    assert_eq!(progress.done.load(Ordering::Relaxed), world.manifest.size());

    // Received content can be served to others.
    let (near, far) = duplex(1 << 16);
    let receiver = world.receiver.clone();
    tokio::spawn(async move { serve(receiver, far, &[]).await });
    let third = Store::open(&world.path("third")).unwrap();
    let mut download = Download::plan(
        &third,
        &world.manifest,
        &world.path("to3"),
        Arc::new(Progress::default()),
    )
    .unwrap();
    download.fetch(near).await.unwrap();
    world.assert_equal("to3");
}

/// The clock stands still until all transfers have ended, so a transfer that waits for a timer does not end.
#[tokio::test(start_paused = true)]
async fn a_transfer_ends_when_the_last_byte_is_written_and_not_at_the_next_tick() {
    let world = World::new(&[("f", content(3 * GROUP, 1))]);
    let (ended, all_ended) = std::sync::mpsc::channel();
    // The paused clock advances only while no blocking task runs. After a minute this task ends, and the test fails.
    let clock =
        tokio::task::spawn_blocking(move || all_ended.recv_timeout(Duration::from_secs(60)));
    let begin = tokio::time::Instant::now();
    for round in 0..40 {
        let receiver = Store::open(&world.path(&format!("receiver-{round}"))).unwrap();
        let to = world.path(&format!("to-{round}"));
        let progress = Arc::new(Progress::default());
        let download = Download::plan(&receiver, &world.manifest, &to, progress);
        download.unwrap().fetch(world.connect()).await.unwrap();
        assert_eq!(begin.elapsed(), Duration::ZERO, "round {round}");
    }
    ended.send(()).unwrap();
    clock.await.unwrap().unwrap();
}

#[tokio::test]
async fn hundreds_of_small_files_pass_through_few_descriptors() {
    let names: Vec<String> = (0..300).map(|i| format!("f{i:03}")).collect();
    let files: Vec<_> = names
        .iter()
        .enumerate()
        .map(|(i, name)| (name.as_str(), content(100 + i, i as u64)))
        .collect();
    let world = World::new(&files);
    let (mut download, _) = world.plan("to").unwrap();
    download.fetch(world.connect()).await.unwrap();
    world.assert_equal("to");
}

#[tokio::test]
async fn equal_files_are_transferred_once_and_known_content_not_at_all() {
    let data = content(5 * GROUP + 9, 1);
    let world = World::new(&[
        ("a", data.clone()),
        ("b/c", data.clone()),
        ("d", content(GROUP, 2)),
    ]);
    let (mut download, progress) = world.plan("to").unwrap();
    download.fetch(world.connect()).await.unwrap();
    world.assert_equal("to");
    assert_eq!(moved(&progress), (data.len() + GROUP) as u64);

    let (download, progress) = world.plan("another").unwrap();
    assert!(download.is_complete());
    world.assert_equal("another");
    assert_eq!(moved(&progress), 0);
}

#[tokio::test]
async fn a_dropped_download_keeps_verified_content_and_resumes_from_it() {
    let world = World::new(&[("big", content(800 * GROUP, 3)), ("z", content(10, 4))]);
    let (mut download, progress) = world.plan("to").unwrap();
    let size = world.manifest.size();
    let mut stream = world.connect();
    let (mut near, far) = duplex(64 * 1024);
    // A link that breaks after 20 MiB of answers.
    let link = tokio::spawn(async move {
        let (mut from_near, mut to_near) = tokio::io::split(&mut near);
        let (mut from_provider, mut to_provider) = tokio::io::split(&mut stream);
        let up = tokio::io::copy(&mut from_near, &mut to_provider);
        let down = async {
            let mut limited = (&mut from_provider).take(20 << 20);
            tokio::io::copy(&mut limited, &mut to_near).await
        };
        // All requests may be out before the link breaks.
        tokio::select! {
            _ = async { up.await.unwrap(); std::future::pending::<()>().await } => {},
            _ = down => {}
        }
    });
    let error = download.fetch(far).await.unwrap_err();
    assert!(!error.is_provider_wrong(), "{error}");
    link.await.unwrap();
    let first = moved(&progress);
    assert!(first > 19 << 20 && first < 20 << 20, "{first}");
    assert!(!world.path("to/big").exists());
    drop(download);

    let (mut download, progress) = world.plan("to").unwrap();
    let had = progress.done.load(Ordering::Relaxed);
    assert!(had == first, "{had} of {first}");
    download.fetch(world.connect()).await.unwrap();
    assert_eq!(moved(&progress), size - had);
    world.assert_equal("to");
}

#[tokio::test]
async fn groups_of_an_earlier_run_that_were_lost_are_fetched_again_before_the_file_gets_its_name() {
    let world = World::new(&[("big", content(300 * GROUP, 3))]);
    let path = world.path("own");
    let plan = |store: &Store| {
        let progress = Arc::new(Progress::default());
        let to = world.path("to");
        let download = Download::plan(store, &world.manifest, &to, Arc::clone(&progress));
        (download.unwrap(), progress)
    };
    {
        let (mut download, _) = plan(&Store::open(&path).unwrap());
        fetch_some(&world, &mut download, 10 << 20).await;
    }
    // A background task still commits the content that was written last.
    let mut store = Store::open(&path);
    while store.is_err() {
        tokio::time::sleep(Duration::from_millis(10)).await;
        store = Store::open(&path);
    }
    let (mut download, progress) = plan(&store.unwrap());
    let had = progress.done.load(Ordering::Relaxed);
    assert!(had > 9 << 20, "{had}");
    // The file is changed after the plan has checked it.
    let mut parts = fs::read_dir(world.path("to")).unwrap();
    let part = parts.find_map(|entry| {
        let path = entry.unwrap().path();
        (path.extension().is_some_and(|end| end == "part")).then_some(path)
    });
    let file = fs::File::options().write(true).open(part.unwrap()).unwrap();
    file.write_all_at(b"lost", 3 * GROUP as u64).unwrap();
    download.fetch(world.connect()).await.unwrap();
    world.assert_equal("to");
    assert_eq!(moved(&progress), world.manifest.size() - had + GROUP as u64);
}

#[tokio::test]
async fn another_provider_finishes_what_one_began() {
    let world = World::new(&[("big", content(400 * GROUP, 3)), ("z", content(10, 4))]);
    let (mut download, progress) = world.plan("to").unwrap();
    fetch_some(&world, &mut download, 9 << 20).await;
    download.fetch(world.connect()).await.unwrap();
    world.assert_equal("to");
    let again = moved(&progress) - world.manifest.size();
    assert!(again <= GROUP as u64, "{again} bytes moved twice");
}

/// Connects to the provider over a link that flips a bit of the answers after the given number of bytes.
fn flip(mut provider: DuplexStream, after: usize) -> DuplexStream {
    let (near, far) = duplex(64 * 1024);
    tokio::spawn(async move {
        let (mut from_near, mut to_near) = tokio::io::split(far);
        let (mut from_provider, mut to_provider) = tokio::io::split(&mut provider);
        let up = tokio::io::copy(&mut from_near, &mut to_provider);
        let down = async {
            let mut passed = 0;
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(n @ 1..) = from_provider.read(&mut buffer).await {
                if (passed..passed + n).contains(&after) {
                    buffer[after - passed] ^= 1;
                }
                passed += n;
                if to_near.write_all(&buffer[..n]).await.is_err() {
                    return;
                }
            }
        };
        tokio::join!(async { drop(up.await) }, down);
    });
    near
}

#[tokio::test]
async fn one_flipped_byte_is_refused_and_never_reaches_a_file() {
    let data = content(100 * GROUP, 5);
    let world = World::new(&[("a", content(50, 1)), ("big", data.clone())]);
    let (mut download, progress) = world.plan("to").unwrap();
    let stream = flip(world.connect(), 60 * GROUP + 20_000);
    let error = download.fetch(stream).await.unwrap_err();
    assert!(matches!(error, TransferError::Corrupt { .. }), "{error}");
    assert!(error.is_provider_wrong());
    let verified = moved(&progress) as usize;
    assert!(
        verified % GROUP == 50 || verified.is_multiple_of(GROUP),
        "{verified}"
    );
    assert!(
        (58 * GROUP..=60 * GROUP + 50).contains(&verified),
        "{verified}"
    );
    assert!(!world.path("to/big").exists());
    drop(download);
    let part = fs::read(part_in(&world.path("to"), data.len())).unwrap();
    let groups = part.chunks(GROUP).zip(data.chunks(GROUP));
    let right = groups.filter(|(got, want)| got == want).count();
    assert_eq!(right, verified / GROUP);
    let wrong = part
        .iter()
        .zip(&data)
        .filter(|(got, want)| **got != 0 && got != want);
    assert_eq!(wrong.count(), 0);
}

fn part_in(folder: &Path, size: usize) -> std::path::PathBuf {
    fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "part"))
        .find(|path| fs::metadata(path).unwrap().len() == size as u64)
        .unwrap()
}

/// Changes one byte and keeps the size and time, so that only the hash tree shows the change.
fn spoil(path: &Path, offset: usize) {
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    let mut data = fs::read(path).unwrap();
    data[offset] ^= 1;
    fs::write(path, &data).unwrap();
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_modified(modified).unwrap();
}

#[tokio::test]
async fn one_bad_bit_at_the_only_provider_costs_one_chunk_group_which_another_provider_sends() {
    let data = content(100 * GROUP, 5);
    let world = World::new(&[("big", data.clone())]);
    spoil(&world.path("source/big"), 60 * GROUP + 77);
    let (mut download, progress) = world.plan("to").unwrap();
    let peer = download.transfer.join(false, None);
    peer.has_all();
    let size = 100 * GROUP as u64;
    {
        let run = download.transfer.run(&mut download.plan);
        let fetch = download.transfer.fetch(&peer, world.connect(), &[]);
        let all_but_one = until("all but one group comes", || {
            moved(&progress) == size - GROUP as u64 && peer.unreadable().is_some()
        });
        tokio::select! {
            result = run => panic!("it ended: {result:?}"),
            result = fetch => panic!("the stream ended: {result:?}"),
            () = all_but_one => {}
        }
    }
    let unreadable = peer.unreadable().unwrap();
    assert_eq!(unreadable.path, "big");
    assert_eq!(unreadable.bytes, 60 * GROUP as u64..61 * GROUP as u64);
    assert_eq!(unreadable.more, 0);
    // The provider still counts everything except the bad group.
    let model = world.provider.model(&world.id).unwrap();
    let presence = world.provider.presence(&model, &world.manifest).unwrap();
    assert!(!presence.complete);
    assert_eq!(presence.bytes, size - GROUP as u64);
    download.transfer.settle().await.unwrap();
    drop((peer, download));

    // The download resumes with a provider that has the group.
    let good = world.path("good");
    write(&good, "big", &data);
    let other = Store::open(&world.path("other")).unwrap();
    let indexed = index(&good, &index::Progress::default()).unwrap();
    other.add(&indexed, None).unwrap();
    let (near, far) = duplex(256 * 1024);
    tokio::spawn(async move { serve(other, far, &[]).await });
    let (mut download, progress) = world.plan("to").unwrap();
    download.fetch(near).await.unwrap();
    assert_eq!(moved(&progress), GROUP as u64);
    assert!(fs::read(world.path("to/big")).unwrap() == data);
}

#[tokio::test]
async fn the_first_damage_found_in_a_file_leads_to_a_check_of_the_whole_file() {
    let world = World::new(&[("big", content(100 * GROUP, 5)), ("z", content(9, 1))]);
    let path = world.path("source/big");
    for group in [3, 60, 61, 99] {
        spoil(&path, group * GROUP + 5);
    }
    let hash = world.manifest.files()[0].blake3;
    let source = world.provider.sources(&hash).unwrap().remove(0);
    source.read_groups(60..61).unwrap_err();
    world.provider.mark_damaged(&source, 60..61).unwrap();
    let here = || {
        let sources = world.provider.sources(&hash).unwrap();
        sources[0].have().count()
    };
    assert!(here() >= 96);
    until("the other damaged groups are found", || here() == 96).await;
    // After a repair, the file counts again once it was verified.
    write(&world.path("source"), "big", &content(100 * GROUP, 5));
    let indexed = index(&world.path("source"), &index::Progress::default()).unwrap();
    world.provider.add(&indexed, None).unwrap();
    assert!(world.provider.sources(&hash).unwrap()[0].is_whole());
}

/// Copies bytes between both ends; those from the provider at the given rate.
async fn slow_link(near: DuplexStream, far: DuplexStream, bytes_per_second: usize) {
    let (mut from_near, mut to_near) = tokio::io::split(near);
    let (mut from_far, mut to_far) = tokio::io::split(far);
    let up = tokio::io::copy(&mut from_near, &mut to_far);
    let down = async {
        let mut buffer = vec![0; bytes_per_second / 4];
        loop {
            let n = from_far.read(&mut buffer).await.unwrap();
            if n == 0 || to_near.write_all(&buffer[..n]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    };
    // Either end may close first.
    let _ = tokio::join!(up, down);
}

#[tokio::test(start_paused = true)]
async fn a_link_of_2_kilobytes_a_second_completes_although_a_chunk_group_takes_long() {
    let world = World::new(&[("a", content(3 * GROUP, 1))]);
    let (near, far) = duplex(1 << 12);
    tokio::spawn(slow_link(far, world.connect(), 2000));
    let (mut download, _) = world.plan("to").unwrap();
    let begun = tokio::time::Instant::now();
    download.fetch(near).await.unwrap();
    world.assert_equal("to");
    let took = begun.elapsed().as_secs();
    assert!((90..150).contains(&took), "{took} s");
}

/// Fetches from a provider that sends `bytes` bytes every 15 s. Returns the error, and the seconds until it occurred.
async fn trickled(bytes: usize) -> (TransferError, u64) {
    let world = World::new(&[("a", content(3 * GROUP, 1))]);
    let (near, far) = duplex(1 << 12);
    let provider = world.connect();
    tokio::spawn(async move {
        let (mut from_near, mut to_near) = tokio::io::split(far);
        let (mut from_far, mut to_far) = tokio::io::split(provider);
        let up = tokio::io::copy(&mut from_near, &mut to_far);
        let down = async {
            // Enough to count as an answer.
            let mut answer = [0; 200];
            from_far.read_exact(&mut answer).await.unwrap();
            to_near.write_all(&answer).await.unwrap();
            let mut part = vec![0; bytes];
            while from_far.read_exact(&mut part).await.is_ok() {
                tokio::time::sleep(Duration::from_secs(15)).await;
                if to_near.write_all(&part).await.is_err() {
                    return;
                }
            }
        };
        let _ = tokio::join!(up, down);
    });
    let (mut download, _) = world.plan("to").unwrap();
    let begun = tokio::time::Instant::now();
    let error = download.fetch(near).await.unwrap_err();
    (error, begun.elapsed().as_secs())
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_sends_single_bytes_is_given_up_like_one_that_sends_none() {
    let (error, seconds) = trickled(1).await;
    assert!(matches!(error, TransferError::Stalled(_)), "{error}");
    assert!((20..100).contains(&seconds), "{seconds}");
}

#[tokio::test(start_paused = true)]
async fn a_provider_that_needs_more_than_ten_minutes_for_a_chunk_group_is_given_up() {
    let (error, seconds) = trickled(100).await;
    assert!(matches!(error, TransferError::TooSlow), "{error}");
    assert!((590..620).contains(&seconds), "{seconds}");
}

#[tokio::test(start_paused = true)]
async fn rate_limits_far_below_a_kilobyte_a_second_end_no_stream() {
    let world = World::new(&[("a", content(2 * GROUP, 1))]);
    for receiving in [true, false] {
        let (near, far) = duplex(256 * 1024);
        let store = world.provider.clone();
        let [upload, download] = match receiving {
            true => [0, 500],
            false => [500, 0],
        };
        let upload = Limit::new(upload);
        let serving = tokio::spawn(async move { serve(store, far, &[upload]).await });
        let to = format!("to{receiving}");
        let receiver = Store::open(&world.path(&format!("store{receiving}"))).unwrap();
        let progress = Arc::new(Progress::default());
        let of = world.path(&to);
        let mut one = Download::plan(&receiver, &world.manifest, &of, progress).unwrap();
        let peer = one.transfer.join(false, None);
        peer.has_all();
        let limits = [Limit::new(download)];
        let begun = tokio::time::Instant::now();
        {
            let run = one.transfer.run(&mut one.plan);
            let fetch = one.transfer.fetch(&peer, near, &limits);
            let (run, fetch) = tokio::join!(run, fetch);
            run.unwrap();
            fetch.unwrap();
        }
        assert!(begun.elapsed().as_secs() > 200);
        assert!(serving.await.unwrap().is_ok());
        world.assert_equal(&to);
    }
}

#[tokio::test(start_paused = true)]
async fn a_requester_that_is_told_to_wait_for_its_turn_does_not_give_up() {
    let world = World::new(&[("a", content(3 * GROUP, 1))]);
    // All turns are taken by requesters that read nothing.
    let uplink = Uplink::default();
    let mut dead = Vec::new();
    for i in 0..8 {
        let (near, far) = duplex(1 << 12);
        let (store, line) = (world.provider.clone(), uplink.line(&[i], &[i]));
        tokio::spawn(async move { serve_in_turn(store, far, &[], line).await });
        let (_reader, mut writer) = tokio::io::split(near);
        let request = BlobRequest {
            hash: world.manifest.files()[0].blake3.as_bytes().to_vec().into(),
            size: Some(3 * GROUP as u64),
            groups: 3,
            waits: true,
            ..Default::default()
        };
        frame::write(&mut writer, &request, 128).await.unwrap();
        dead.push((_reader, writer));
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(uplink.streams().1 > 0, "{uplink:?}");
    let (near, far) = duplex(256 * 1024);
    let (store, line) = (world.provider.clone(), uplink.line(b"alive", b"alive"));
    tokio::spawn(async move { serve_in_turn(store, far, &[], line).await });
    let (mut download, _) = world.plan("to").unwrap();
    download.fetch(near).await.unwrap();
    assert!(download.transfer.queued() > 0);
    world.assert_equal("to");
}

#[tokio::test(start_paused = true)]
async fn a_stream_whose_file_cannot_be_read_gives_its_turn_back() {
    let world = World::new(&[("a", content(3 * GROUP, 1))]);
    let file = fs::File::options()
        .write(true)
        .open(world.path("source/a"))
        .unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(&[0xff; 100], 7).unwrap();
    file.set_times(fs::FileTimes::new().set_modified(modified))
        .unwrap();
    let uplink = Uplink::default();
    let (near, far) = duplex(1 << 20);
    let (store, line) = (world.provider.clone(), uplink.line(&[1], &[1]));
    tokio::spawn(async move { serve_in_turn(store, far, &[], line).await });
    let (mut reader, mut writer) = tokio::io::split(near);
    let mut request = BlobRequest {
        hash: world.manifest.files()[0].blake3.as_bytes().to_vec().into(),
        size: Some(3 * GROUP as u64),
        first_group: 2,
        groups: 1,
        waits: true,
        ..Default::default()
    };
    // A group that can be read, then a request that includes one that cannot.
    frame::write(&mut writer, &request, 128).await.unwrap();
    let response: BlobResponse = frame::read(&mut reader, 128).await.unwrap().unwrap();
    assert_eq!(response.status(), Status::Ok);
    let mut rest = vec![0; GROUP + 64];
    reader.read_exact(&mut rest).await.unwrap();
    (request.first_group, request.groups, request.answered) = (0, 3, 1);
    frame::write(&mut writer, &request, 128).await.unwrap();
    let response: BlobResponse = frame::read(&mut reader, 128).await.unwrap().unwrap();
    assert_eq!(response.status(), Status::Internal);
    // The requester has received all answers.
    (request.cancel, request.answered) = (Some(u64::MAX), 2);
    frame::write(&mut writer, &request, 128).await.unwrap();
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        if uplink.streams() == (0, 0) {
            return;
        }
    }
    panic!("{uplink:?}");
}

#[tokio::test]
async fn several_providers_share_the_work_and_supply_what_others_lack() {
    let world = World::new(&[
        ("big", content(600 * GROUP + 5, 3)),
        ("small", content(10, 4)),
    ]);
    let progress = Arc::new(Progress::default());
    let transfer = Transfer::new(&world.receiver, &world.manifest, Arc::clone(&progress), 1);
    let mut plan = Plan::new(
        &world.receiver,
        &world.manifest,
        None,
        &world.path("to"),
        Arc::clone(&progress),
    )
    .unwrap();
    let peers: Vec<_> = (0..4).map(|_| transfer.join(false, None)).collect();
    peers[0].has(0, 0..300);
    peers[1].has(0, 200..601);
    peers[2].has(1, 0..1);
    // The last peer does not announce any content, and is not asked.
    let mut run = Box::pin(transfer.run(&mut plan));
    let fetches = peers
        .iter()
        .map(|peer| transfer.fetch(peer, world.connect(), &[]));
    let mut all = Box::pin(futures::future::try_join_all(fetches));
    tokio::select! {
        result = &mut run => result.unwrap(),
        result = &mut all => {
            result.unwrap();
            run.await.unwrap();
        }
    }
    world.assert_equal("to");
    let sent: Vec<u64> = peers.iter().map(|peer| peer.moved()).collect();
    let group = GROUP as u64;
    assert!(
        sent[0] >= 200 * group && sent[1] >= 301 * group - group,
        "{sent:?}"
    );
    assert_eq!(sent[2..], [10, 0]);
    // At the end, both providers may be asked for the same piece if one of them stalls.
    let wasted: u64 = peers.iter().map(|peer| peer.wasted()).sum();
    let twice = moved(&progress) - world.manifest.size() + wasted;
    assert!(twice <= 16 * group, "{twice} bytes were received twice");
}

#[tokio::test]
async fn content_that_is_still_arriving_is_served_to_others() {
    let world = World::new(&[("big", content(400 * GROUP, 3))]);
    let (mut download, progress) = world.plan("to").unwrap();
    fetch_some(&world, &mut download, 5 << 20).await;
    let hash = world.manifest.files()[0].blake3;
    let have = world.receiver.sources(&hash).unwrap()[0].have();
    assert_eq!(have.count() * GROUP as u64, moved(&progress));

    // A third node fetches the content that is here: while it is being received, and after the download was dropped.
    let third = Store::open(&world.path("third")).unwrap();
    for again in [false, true] {
        let progress = Arc::new(Progress::default());
        let transfer = Transfer::new(&third, &world.manifest, Arc::clone(&progress), 1);
        let mut plan = Plan::new(
            &third,
            &world.manifest,
            None,
            &world.path("to3"),
            Arc::clone(&progress),
        )
        .unwrap();
        let (near, far) = duplex(1 << 16);
        let receiver = world.receiver.clone();
        tokio::spawn(async move { serve(receiver, far, &[]).await });
        let peer = transfer.join(false, None);
        let first = have.next_run(0).unwrap();
        let wanted = match again {
            false => {
                peer.has(0, first.clone());
                first.end - first.start
            }
            true => {
                have.runs().for_each(|run| peer.has(0, run));
                have.count() - (first.end - first.start)
            }
        };
        let work =
            async { tokio::join!(transfer.run(&mut plan), transfer.fetch(&peer, near, &[])) };
        let all_here = async {
            while moved(&progress) < wanted * GROUP as u64 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            _ = work => panic!("a part is not the whole blob"),
            _ = tokio::time::timeout(Duration::from_secs(20), all_here) => {}
        }
        assert_eq!(moved(&progress), wanted * GROUP as u64);
        if !again {
            drop(std::mem::replace(
                &mut download,
                world.plan("another").unwrap().0,
            ));
        }
    }
}

#[tokio::test]
async fn a_part_file_that_one_node_left_is_continued_by_another_node_with_its_own_home() {
    let world = World::new(&[("big", content(300 * GROUP, 3)), ("one", content(5000, 4))]);
    let (mut download, progress) = world.plan("to").unwrap();
    fetch_some(&world, &mut download, 12 << 20).await;
    drop(download);
    let first = moved(&progress);
    assert!(first > 100 * GROUP as u64, "{first}");
    // Some of the part file is damaged.
    let part = fs::read_dir(world.path("to")).unwrap();
    let mut parts = part.map(|entry| entry.unwrap().path());
    let part = parts
        .find(|path| fs::metadata(path).unwrap().len() == 300 * GROUP as u64)
        .unwrap();
    let file = fs::File::options().write(true).open(part).unwrap();
    file.write_all_at(&[0xff; 100], 0).unwrap();

    let other = Store::open(&world.path("other")).unwrap();
    let progress = Arc::new(Progress::default());
    let mut download = Download::plan(
        &other,
        &world.manifest,
        &world.path("to"),
        Arc::clone(&progress),
    )
    .unwrap();
    download.fetch(world.connect()).await.unwrap();
    world.assert_equal("to");
    let (again, reused) = (moved(&progress), progress.reused.load(Ordering::Relaxed));
    let size = world.manifest.size();
    // The small file may have been completed before.
    assert!(
        again + reused + 5000 >= size,
        "{again} and {reused} of {size}"
    );
    // Everything except the damage, and the rest of the run in which it was found.
    assert!(reused + 17 * GROUP as u64 >= first, "{reused} of {first}");
    assert!(again < size - first + 34 * GROUP as u64, "{again}");
}

#[tokio::test]
async fn damage_that_another_plan_finds_in_an_arriving_part_file_is_fetched_again() {
    let world = World::new(&[("big", content(200 * GROUP, 3))]);
    let progress = Arc::new(Progress::default());
    let transfer = Transfer::new(&world.receiver, &world.manifest, Arc::clone(&progress), 1);
    let plan = |to: &str, progress: &Arc<Progress>| {
        let (store, manifest) = (&world.receiver, &world.manifest);
        Plan::new(store, manifest, None, &world.path(to), Arc::clone(progress)).unwrap()
    };
    let mut first = plan("to", &progress);
    let peer = transfer.join(false, None);
    peer.has(0, 0..100);
    let hash = world.manifest.files()[0].blake3;
    let other_get = async {
        while moved(&progress) < 100 * GROUP as u64 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        transfer.settle().await.unwrap();
        let part = fs::read_dir(world.path("to")).unwrap();
        let part = part.map(|entry| entry.unwrap().path());
        let part = part
            .into_iter()
            .find(|path| path.extension().is_some_and(|end| end == "part"));
        let part = fs::File::options().write(true).open(part.unwrap()).unwrap();
        part.write_all_at(&[0xff; 100], 7 * GROUP as u64).unwrap();
        // The second plan copies local content, and finds the damage.
        let _second = plan("another", &Arc::default());
        let here = world.receiver.sources(&hash).unwrap();
        assert!(here.iter().all(|source| !source.has(7..8)));
        peer.has(0, 100..200);
    };
    let work = async {
        let (run, fetch, ()) = tokio::join!(
            transfer.run(&mut first),
            transfer.fetch(&peer, world.connect(), &[]),
            other_get,
        );
        run.unwrap();
        fetch.unwrap();
    };
    tokio::time::timeout(Duration::from_secs(60), work)
        .await
        .unwrap();
    world.assert_equal("to");
}

#[tokio::test]
async fn a_provider_that_lacks_content_and_one_that_sends_garbage_give_different_errors() {
    let world = World::new(&[("a", content(3 * GROUP, 1))]);
    let (mut download, _) = world.plan("to").unwrap();
    let empty = Store::open(&world.path("empty")).unwrap();
    let (near, far) = duplex(1 << 16);
    tokio::spawn(async move { serve(empty, far, &[]).await });
    assert!(matches!(
        download.fetch(near).await.unwrap_err(),
        TransferError::Missing(_)
    ));
    for garbage in [&[0xff; 4096][..], &[2, 8, 1], &[4, 8, 1, 16, 9]] {
        let (near, mut far) = duplex(1 << 16);
        far.write_all(garbage).await.unwrap();
        let keep = far;
        let error = download.fetch(near).await.unwrap_err();
        assert!(error.is_provider_wrong(), "{garbage:?}: {error}");
        drop(keep);
    }
    download.fetch(world.connect()).await.unwrap();
    world.assert_equal("to");
}

#[tokio::test(start_paused = true)]
async fn a_silent_provider_counts_as_lost() {
    let world = World::new(&[("a", content(3 * GROUP, 1))]);
    let (near, _far) = duplex(1 << 16);
    let error = tokio::time::timeout(
        Duration::from_secs(60),
        fetch_manifest(near, world.id, &Arrivals::default()),
    )
    .await
    .unwrap()
    .unwrap_err();
    assert!(matches!(error, TransferError::Stalled(_)));
}

#[tokio::test]
async fn existing_files_are_adopted_or_refused_but_never_replaced() {
    let world = World::new(&[("a", content(3 * GROUP, 1)), ("b/c", content(10, 2))]);
    write(&world.path("same"), "a", &content(3 * GROUP, 1));
    let (mut download, progress) = world.plan("same").unwrap();
    download.fetch(world.connect()).await.unwrap();
    assert_eq!(moved(&progress), 10);

    for (i, (path, data)) in [("a", content(3 * GROUP, 9)), ("a", vec![]), ("b", vec![1])]
        .into_iter()
        .enumerate()
    {
        let to = format!("other{i}");
        write(&world.path(&to), path, &data);
        assert!(matches!(
            world.plan(&to),
            Err(PlanError::TargetExists { count: 1, .. })
        ));
        assert_eq!(fs::read(world.path(&to).join(path)).unwrap(), data);
        assert_eq!(fs::read_dir(world.path(&to)).unwrap().count(), 1);
    }

    fs::create_dir_all(world.path("linked")).unwrap();
    fs::create_dir_all(world.path("victim")).unwrap();
    std::os::unix::fs::symlink(world.path("victim"), world.path("linked/b")).unwrap();
    assert!(matches!(
        world.plan("linked"),
        Err(PlanError::TargetExists { .. })
    ));
    assert_eq!(fs::read_dir(world.path("victim")).unwrap().count(), 0);
}

#[tokio::test]
async fn hostile_requests_are_refused_without_harm() {
    let world = World::new(&[("a", content(3 * GROUP, 1))]);
    for bytes in [
        &[0xff, 0xff, 0xff, 0xff, 0x7f][..],
        &[3, 1, 2, 3],
        &[0],
        &[200, 1],
        &[4, 10, 2, 1, 1],
    ] {
        let mut stream = world.connect();
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert!(answer.len() < 16, "{answer:?}");
    }
}

/// Returns the provider's whole answer to a request for these groups of the only file.
async fn answer_to(world: &World, first_group: u64, groups: u64, size: u64) -> Vec<u8> {
    let request = BlobRequest {
        hash: world.manifest.files()[0].blake3.as_bytes().to_vec().into(),
        size: Some(size),
        first_group,
        groups,
        ..Default::default()
    };
    let mut stream = world.connect();
    frame::write(&mut stream, &request, 128).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn invalid_ranges_are_refused_and_no_content_is_sent() {
    let world = World::new(&[("a", content(300 * GROUP, 1))]);
    let size = 300 * GROUP as u64;
    let status = |answer: &[u8]| {
        let answer = BlobResponse::decode_length_delimited(answer).unwrap();
        answer.status()
    };
    for (first, groups) in [
        (0, 0),
        (0, 257),
        (0, u64::MAX),
        (44, 257),
        (299, 2),
        (300, 1),
        (u64::MAX, 1),
        (u64::MAX, u64::MAX),
        (u64::MAX - 1, 2),
    ] {
        let answer = answer_to(&world, first, groups, size).await;
        assert_eq!(status(&answer), Status::BadRequest, "{first}, {groups}");
        assert!(answer.len() < 16, "{first}, {groups}");
    }
    // There is no content of another size.
    for other in [0, size - 1, size + 1, u64::MAX] {
        let answer = answer_to(&world, 0, 1, other).await;
        assert_eq!(status(&answer), Status::NotFound, "{other}");
    }
    for (first, groups) in [(0, 256), (44, 256), (299, 1)] {
        let answer = answer_to(&world, first, groups, size).await;
        assert!(answer.len() > groups as usize * GROUP, "{first}, {groups}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_requester_that_asks_for_nothing_or_reads_nothing_is_dropped_after_a_minute() {
    let world = World::new(&[("a", content(300 * GROUP, 1))]);
    for asks in [false, true] {
        let (mut near, far) = duplex(64 * 1024);
        let store = world.provider.clone();
        let begun = tokio::time::Instant::now();
        let serving = tokio::spawn(async move { serve(store, far, &[]).await });
        if asks {
            let request = BlobRequest {
                hash: world.manifest.files()[0].blake3.as_bytes().to_vec().into(),
                size: Some(300 * GROUP as u64),
                groups: 256,
                ..Default::default()
            };
            frame::write(&mut near, &request, 128).await.unwrap();
        }
        let served = serving.await.unwrap();
        assert!(matches!(served, Err(ServeError::Idle)), "{served:?}");
        let took = begun.elapsed();
        assert!((60..70).contains(&took.as_secs()), "{took:?}");
        drop(near);
    }
}

/// Waits until the condition is true, for at most 30 s.
async fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(30), "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Truncates a file and keeps its time.
fn cut(path: &Path, size: usize) {
    let file = fs::File::options().write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.set_len(size as u64).unwrap();
    file.set_modified(modified).unwrap();
}

#[tokio::test]
async fn a_truncated_file_is_neither_served_nor_reused() {
    let world = World::new(&[("big", content(100 * GROUP + 7, 5))]);
    let size = world.manifest.size() as usize;
    let hash = world.manifest.files()[0].blake3;
    let (mut download, _) = world.plan("to").unwrap();
    download.fetch(world.connect()).await.unwrap();
    // Found both when the file is opened and when it was open before; cut by one byte, within a group, and to nothing.
    for left in [size - 1, 50 * GROUP + 9, 0] {
        let open = world.receiver.sources(&hash).unwrap().remove(0);
        assert!(open.is_whole());
        let path = open.path().unwrap().to_owned();
        cut(&path, left);
        assert!(open.read_groups(0..101).is_err(), "{left}");
        assert!(open.read_groups(0..1).is_err(), "{left}");
        assert!(world.receiver.sources(&hash).unwrap().is_empty(), "{left}");
        let to = format!("after-{left}");
        let (mut download, progress) = world.plan(&to).unwrap();
        assert_eq!(progress.done.load(Ordering::Relaxed), 0, "{left}");
        download.fetch(world.connect()).await.unwrap();
        world.assert_equal(&to);
        assert_eq!(moved(&progress), size as u64, "{left}");
    }
    cut(&world.path("source/big"), size - 1);
    let (mut download, _) = world.plan("last").unwrap();
    // The copy fetched last is still good.
    assert!(download.is_complete());
    cut(&world.path("last/big"), 1);
    cut(&world.path("after-0/big"), 1);
    download = world.plan("none").unwrap().0;
    let error = download.fetch(world.connect()).await.unwrap_err();
    assert!(matches!(error, TransferError::Missing(_)), "{error}");
    assert!(!world.path("none/big").exists());
}

#[tokio::test]
async fn a_truncated_part_file_is_fetched_from_the_beginning() {
    let world = World::new(&[("big", content(300 * GROUP, 3))]);
    let size = world.manifest.size();
    for left in [size as usize - 1, 0] {
        let to = format!("to-{left}");
        let (mut download, _) = world.plan(&to).unwrap();
        fetch_some(&world, &mut download, 9 << 20).await;
        drop(download);
        let part = part_in(&world.path(&to), size as usize);
        cut(&part, left);
        let hash = world.manifest.files()[0].blake3;
        // Blocking work of the dropped transfer may still hold the part file. While it is open, its content is
        // offered to readers, who check it themselves.
        until("the part file is not offered", || {
            world.receiver.sources(&hash).unwrap().is_empty()
        })
        .await;
        let (mut download, progress) = world.plan(&to).unwrap();
        assert_eq!(progress.done.load(Ordering::Relaxed), 0);
        download.fetch(world.connect()).await.unwrap();
        world.assert_equal(&to);
        assert_eq!(moved(&progress), size);
        fs::remove_dir_all(world.path(&to)).unwrap();
    }
}

#[tokio::test]
async fn nothing_damaged_is_reused_from_a_damaged_local_copy() {
    let data = content(600 * GROUP, 3);
    let world = World::new(&[("big", data.clone())]);
    let (mut download, _) = world.plan("to").unwrap();
    download.fetch(world.connect()).await.unwrap();
    let path = world.path("to/big");
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    let mut bad = data;
    bad[400 * GROUP + 5] ^= 1;
    fs::write(&path, &bad).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(modified).unwrap();
    let (mut download, progress) = world.plan("again").unwrap();
    assert!(!download.is_complete());
    let taken = progress.done.load(Ordering::Relaxed);
    assert_eq!(taken, 256 * GROUP as u64, "the groups before the damage");
    download.fetch(world.connect()).await.unwrap();
    world.assert_equal("again");
    assert_eq!(moved(&progress), world.manifest.size() - taken);
}

/// Fetches over a link to the provider that breaks after `bytes` bytes of answers.
async fn fetch_some(world: &World, download: &mut Download, bytes: u64) {
    let (near, mut far) = duplex(64 * 1024);
    let mut stream = world.connect();
    tokio::spawn(async move {
        let (mut from_near, mut to_near) = tokio::io::split(&mut far);
        let (mut from_provider, mut to_provider) = tokio::io::split(&mut stream);
        let mut limited = (&mut from_provider).take(bytes);
        let up = async {
            tokio::io::copy(&mut from_near, &mut to_provider)
                .await
                .unwrap();
            std::future::pending::<()>().await
        };
        tokio::select! {
            _ = up => {}
            _ = tokio::io::copy(&mut limited, &mut to_near) => {}
        }
    });
    download.fetch(near).await.unwrap_err();
}

#[tokio::test]
async fn a_part_file_that_was_removed_is_never_vouched_for() {
    let world = World::new(&[
        ("a", content(300 * GROUP, 1)),
        ("b", content(300 * GROUP, 2)),
    ]);
    let (mut download, _) = world.plan("to").unwrap();
    fetch_some(&world, &mut download, 15 << 20).await;
    drop(download);
    // The user clears the folder. The next run is cut off before it has received anything of the file.
    fs::remove_dir_all(world.path("to")).unwrap();
    let (mut download, progress) = world.plan("to").unwrap();
    assert_eq!(progress.done.load(Ordering::Relaxed), 0);
    fetch_some(&world, &mut download, 10).await;
    drop(download);
    let (mut download, progress) = world.plan("to").unwrap();
    assert_eq!(progress.done.load(Ordering::Relaxed), 0);
    download.fetch(world.connect()).await.unwrap();
    world.assert_equal("to");
    assert_eq!(moved(&progress), world.manifest.size());
}

#[tokio::test]
async fn outboards_of_forgotten_part_files_are_not_reused() {
    let world = World::new(&[("a", content(300 * GROUP, 1))]);
    let id = world.id;
    let expect = |to: &str| {
        let root = world.path(to);
        fs::create_dir_all(&root).unwrap();
        let bytes = world.manifest.encode();
        world.receiver.add_manifest(&bytes).unwrap();
        world
            .receiver
            .record_fetch(id, &root.canonicalize().unwrap(), None, true)
            .unwrap();
    };
    for to in ["one", "two"] {
        expect(to);
        let (mut download, _) = world.plan(to).unwrap();
        fetch_some(&world, &mut download, 5 << 20).await;
        drop(download);
    }
    // Removes the outboard that both part files share.
    let mut tries = 0;
    while let Err(error) = world.receiver.remove(&id, false) {
        // The dropped download may still be committing.
        assert!(tries < 1000, "{error}");
        tries += 1;
        tokio::task::yield_now().await;
        std::thread::park_timeout(Duration::from_millis(5));
    }
    for to in ["two", "one"] {
        let (mut download, progress) = world.plan(to).unwrap();
        assert_eq!(progress.done.load(Ordering::Relaxed), 0, "{to}");
        download.fetch(world.connect()).await.unwrap();
        world.assert_equal(to);
        fs::remove_dir_all(world.path(to)).unwrap();
    }
}

#[tokio::test]
async fn removing_with_files_deletes_only_files_that_were_fetched() {
    let world = World::new(&[
        ("mine", content(10, 1)),
        ("sub/fetched", content(3 * GROUP, 2)),
    ]);
    write(&world.path("to"), "mine", &content(10, 1));
    let manifest = world.manifest.encode();
    world.receiver.add_manifest(&manifest).unwrap();
    let (mut download, _) = world.plan("to").unwrap();
    world
        .receiver
        .record_fetch(world.id, download.root(), None, true)
        .unwrap();
    download.fetch(world.connect()).await.unwrap();
    let removed = world.receiver.remove(&world.id, true).unwrap();
    assert_eq!(removed.files_deleted, 1);
    assert!(world.path("to/mine").exists());
    assert!(!world.path("to/sub").exists());
}

#[tokio::test]
async fn a_lost_outboard_makes_its_content_absent_and_is_not_an_error() {
    let world = World::new(&[("a", content(3 * GROUP, 1))]);
    let tree = world
        .path("provider/outboards")
        .join(world.manifest.files()[0].blake3.to_string());
    fs::remove_file(tree).unwrap();
    let (mut download, _) = world.plan("to").unwrap();
    assert!(matches!(
        download.fetch(world.connect()).await.unwrap_err(),
        TransferError::Missing(_)
    ));
    world
        .provider
        .add(
            &index(&world.path("source"), &index::Progress::default()).unwrap(),
            None,
        )
        .unwrap();
    download.fetch(world.connect()).await.unwrap();
    world.assert_equal("to");
}
