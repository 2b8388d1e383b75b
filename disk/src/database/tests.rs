//! A database on disks that fill up, fail, vanish and lose power.

use std::{fs, sync::Arc, thread};

use redb::{ReadableTable, TableDefinition};

use super::*;
use crate::testing::Disk;

const TABLE: TableDefinition<'_, u64, u64> = TableDefinition::new("t");

/// A pause that is short, yet long enough for a hundred calls.
const SHORT: Duration = Duration::from_millis(200);

fn options() -> Options {
    Options::new("test", 1 << 20).with_pause(SHORT)
}

/// Opens a database on `disk` without a cache, so that each read reaches the disk. Also returns the number of openings.
fn on(disk: &Disk) -> (Database, Arc<AtomicU64>) {
    let (disk, opened) = (disk.clone(), Arc::new(AtomicU64::new(0)));
    let counted = Arc::clone(&opened);
    let open = move || {
        counted.fetch_add(1, Ordering::Relaxed);
        let mut builder = redb::Database::builder();
        builder.set_cache_size(0);
        builder.create_with_backend(disk.clone())
    };
    (Database::open_with(open, options()).unwrap(), opened)
}

fn put(database: &Database, key: u64) -> Result<(), Error> {
    database.write(|txn| {
        let mut table = txn.open_table(TABLE).map_err(Error::of)?;
        table.insert(key, key).map_err(Error::of)?;
        Ok(())
    })
}

fn has(database: &Database, key: u64) -> Result<bool, Error> {
    database.read(|txn| {
        let table = txn.open_table(TABLE).map_err(Error::of)?;
        Ok(table.get(key).map_err(Error::of)?.is_some())
    })
}

/// Tries until it succeeds, for up to ten seconds.
fn eventually<T>(attempt: impl Fn() -> Result<T, Error>) -> T {
    let begun = Instant::now();
    loop {
        match attempt() {
            Ok(done) => return done,
            Err(error) => assert!(begun.elapsed() < Duration::from_secs(10), "{error}"),
        }
        thread::sleep(SHORT / 10);
    }
}

#[test]
fn writes_succeed_again_when_a_full_disk_has_room() {
    let disk = Disk::default();
    let (database, _) = on(&disk);
    put(&database, 1).unwrap();
    for key in 2..5 {
        disk.fill(true);
        assert!(matches!(put(&database, key), Err(Error::Full)));
        // Also right after a reopening.
        assert!(matches!(put(&database, key), Err(Error::Full)));
        disk.fill(false);
        assert!(eventually(|| has(&database, 1)));
        assert!(!has(&database, key).unwrap());
        put(&database, key).unwrap();
        assert!(has(&database, key).unwrap());
    }
}

#[test]
fn reads_succeed_again_when_a_disk_recovers_and_do_not_each_reopen_the_database() {
    let disk = Disk::default();
    let (database, opened) = on(&disk);
    put(&database, 1).unwrap();
    disk.fail_reads(true);
    let begun = Instant::now();
    for _ in 0..100 {
        assert!(has(&database, 1).is_err());
    }
    let pauses = begun.elapsed().as_millis() / SHORT.as_millis();
    let most = (1 + pauses as u64) * u64::from(MAX_OPENED);
    assert!(opened.load(Ordering::Relaxed) <= 1 + most);
    disk.fail_reads(false);
    // Without any write in between.
    assert!(eventually(|| has(&database, 1)));
    put(&database, 2).unwrap();
    assert!(has(&database, 2).unwrap());
}

#[test]
fn a_failed_opening_is_not_repeated_within_the_pause() {
    let disk = Disk::default();
    let (database, opened) = on(&disk);
    put(&database, 1).unwrap();
    disk.fill(true);
    let begun = Instant::now();
    for _ in 0..100 {
        assert!(matches!(put(&database, 2), Err(Error::Full)));
        assert!(database.reopen().is_err());
    }
    let pauses = begun.elapsed().as_millis() / SHORT.as_millis();
    assert!(opened.load(Ordering::Relaxed) <= 3 + pauses as u64);
    disk.fill(false);
    eventually(|| put(&database, 2));
}

#[test]
fn without_a_pause_the_next_transaction_reopens_the_database() {
    let disk = Disk::default();
    let of_database = disk.clone();
    let open = move || redb::Database::builder().create_with_backend(of_database.clone());
    let options = options().with_pause(Duration::ZERO);
    let database = Database::open_with(open, options).unwrap();
    put(&database, 1).unwrap();
    for key in 2..9 {
        disk.fill(true);
        put(&database, key).unwrap_err();
        put(&database, key).unwrap_err();
        disk.fill(false);
        put(&database, key).unwrap();
    }
}

#[test]
fn a_missing_file_is_not_created_again() {
    let folder = tempfile::tempdir().unwrap();
    let [path, aside] = ["a.redb", "aside.redb"].map(|name| folder.path().join(name));
    let database = Database::open(&path, options()).unwrap();
    put(&database, 1).unwrap();
    fs::rename(&path, &aside).unwrap();
    let gone = database.reopen().unwrap_err();
    assert!(gone.is_missing_file(), "{gone}");
    assert!(has(&database, 1).is_err());
    assert!(put(&database, 2).is_err());
    thread::sleep(SHORT);
    assert!(put(&database, 2).is_err());
    assert!(!path.exists());
    fs::rename(&aside, &path).unwrap();
    assert!(eventually(|| has(&database, 1)));
    put(&database, 2).unwrap();
    drop(database);
    let database = Database::open(&path, options()).unwrap();
    assert!(has(&database, 1).unwrap() && has(&database, 2).unwrap());
}

#[test]
fn opening_waits_for_a_user_that_is_just_closing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let database = Database::open(&path, options()).unwrap();
    put(&database, 1).unwrap();
    let closing = thread::spawn(move || {
        thread::sleep(SHORT);
        drop(database);
    });
    let database = Database::open(&path, options()).unwrap();
    assert!(has(&database, 1).unwrap());
    closing.join().unwrap();
    assert!(matches!(
        Database::open(&path, options()),
        Err(Error::InUse)
    ));
}

#[test]
fn reopening_waits_for_a_transaction_that_keeps_the_old_database_open() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    let database = Database::open(&path, options()).unwrap();
    put(&database, 1).unwrap();
    let kept = database.begin_read().unwrap();
    let ending = thread::spawn(move || {
        thread::sleep(SHORT);
        drop(kept);
    });
    database.reopen().unwrap();
    assert!(has(&database, 1).unwrap());
    ending.join().unwrap();
}

#[test]
fn a_damaged_file_is_reported_and_left_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.redb");
    fs::write(&path, [7; 5000]).unwrap();
    assert!(matches!(
        Database::open(&path, options()),
        Err(Error::Damaged(_))
    ));
    assert_eq!(fs::read(&path).unwrap(), [7; 5000]);
}

#[test]
fn a_change_that_is_rolled_back_or_fails_leaves_nothing() {
    let disk = Disk::default();
    let (database, opened) = on(&disk);
    put(&database, 1).unwrap();
    let insert = |txn: &WriteTransaction| -> Result<(), Error> {
        let mut table = txn.open_table(TABLE).map_err(Error::of)?;
        table.insert(2, 2).map_err(Error::of)?;
        Ok(())
    };
    database
        .decide(|txn| insert(txn).map(Outcome::Abort))
        .unwrap();
    let failed: Result<(), Error> = database.write(|txn| {
        insert(txn)?;
        Err(Error::InUse)
    });
    failed.unwrap_err();
    assert!(!has(&database, 2).unwrap());
    // Neither was a fault.
    assert_eq!(opened.load(Ordering::Relaxed), 1);
}

#[test]
fn an_acknowledged_change_survives_faults_and_power_losses_at_any_point() {
    for seed in 0..60 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut disk = Disk::default();
        let mut acknowledged = 0;
        let mut next = 0;
        // Several times: the remains of one crash are the start of the next run.
        for _ in 0..4 {
            let (database, _) = on(&disk);
            let kept: Vec<u64> = database
                .decide(|txn| -> Result<_, Error> {
                    let table = txn.open_table(TABLE).map_err(Error::of)?;
                    let rows = table.iter().map_err(Error::of)?;
                    let keys = rows.map(|row| Ok(row.map_err(Error::of)?.0.value()));
                    Ok(Outcome::Abort(keys.collect::<Result<_, Error>>()?))
                })
                .unwrap();
            // All acknowledged changes, and at most the change in progress.
            assert!(kept.iter().copied().eq(0..kept.len() as u64), "seed {seed}");
            let count = kept.len() as u64;
            assert!((acknowledged..=next).contains(&count), "seed {seed}");
            (acknowledged, next) = (count, count);
            disk.fail_in(Some(random.u64(..120)));
            while put(&database, next).is_ok() {
                next += 1;
                acknowledged = next;
            }
            next += 1;
            // Sometimes the disk comes back without a power loss: redb reopens the database and continues.
            if random.bool() {
                disk.fail_in(None);
                eventually(|| put(&database, acknowledged));
                acknowledged += 1;
                next = next.max(acknowledged);
            }
            drop(database);
            disk = disk.lose_power(&mut |below| random.usize(..below));
        }
    }
}
