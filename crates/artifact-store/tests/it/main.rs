//! What the artifact store promises: nothing but the bytes of the digest ever comes out.

use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use protocol::Digest;
use tempfile::TempDir;
use tether_artifact_store::{ArtifactStore, FinishError, Import, OpenError, Partial, PutError, hash};

const MIB: u64 = 1024 * 1024;

fn store() -> (TempDir, ArtifactStore) {
    let folder = tempfile::tempdir().expect("a folder");
    let store = ArtifactStore::in_folder(folder.path()).expect("a store");
    (folder, store)
}

fn path(folder: &Path, digest: &Digest) -> PathBuf {
    let name = digest.to_string();
    folder.join("sha256").join(&name[..2]).join(name)
}

/// Overwrites a stored artifact as an attacker with the owner's rights would.
fn overwrite(folder: &Path, digest: &Digest, bytes: &[u8]) {
    let path = path(folder, digest);
    fs::remove_file(&path).expect("it was there");
    fs::write(&path, bytes).expect("written");
}

fn content() -> Vec<u8> {
    (0..MIB as u32 / 2).flat_map(|number| (number as u16).to_le_bytes()).collect()
}

fn read(store: &ArtifactStore, digest: &Digest) -> Vec<u8> {
    let mut opened = store.open(digest).expect("it verifies");
    assert_eq!(opened.digest, *digest);
    let mut bytes = Vec::new();
    opened.file.read_to_end(&mut bytes).expect("it reads");
    assert_eq!(opened.bytes, bytes.len() as u64);
    bytes
}

#[test]
fn what_was_put_comes_back_by_its_digest() {
    let (folder, store) = store();
    let stored = store.put(&content()[..], MIB).expect("it fits");
    assert_eq!((stored.digest, stored.bytes), (Digest::of(&content()), MIB));
    assert!(store.contains(&stored.digest));
    assert_eq!(read(&store, &stored.digest), content());
    // Another process, or the next start, sees the same.
    let again = ArtifactStore::in_folder(folder.path()).expect("a store");
    assert_eq!(read(&again, &stored.digest), content());
}

#[test]
fn a_file_is_copied_and_can_then_be_removed() {
    let (folder, store) = store();
    let source = folder.path().join("model.gguf");
    fs::write(&source, content()).expect("written");
    let stored = store.put_file(&source).expect("it is copied");
    fs::remove_file(&source).expect("removed");
    assert_eq!(read(&store, &stored.digest), content());
}

#[expect(clippy::unnecessary_wraps, reason = "others end the copy")]
fn went(_: u64) -> std::io::Result<()> {
    Ok(())
}

/// Returns what lies in a folder of the store, with the folders below it.
fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return vec![] };
    let path = |entry: std::io::Result<fs::DirEntry>| entry.expect("listed").path();
    let below = |path: PathBuf| if path.is_dir() { names(&path) } else { vec![path.display().to_string()] };
    entries.map(path).flat_map(below).collect()
}

#[test]
fn an_open_file_is_shared_or_copied_whatever_its_length() {
    let (folder, store) = store();
    for length in [0, 1, MIB - 1, MIB, MIB + 1, 9 * MIB + 7] {
        let bytes: Vec<u8> = content().iter().copied().cycle().take(length as usize).collect();
        let source = folder.path().join("model.gguf");
        fs::write(&source, &bytes).expect("written");
        let mut bytes_done = 0;
        let tell = |done| {
            bytes_done = done;
            Ok(())
        };
        let (stored, import) = store.put_open(&fs::File::open(&source).expect("opened"), length, tell).expect("put");
        assert!(matches!(import, Import::Cloned | Import::Copied), "{import:?}");
        assert_eq!((stored.digest, stored.bytes, bytes_done), (Digest::of(&bytes), length, length));
        fs::write(&source, b"other").expect("written");
        assert_eq!(read(&store, &stored.digest), bytes);
    }
}

#[test]
fn who_stops_a_copy_leaves_nothing_behind() {
    let (folder, store) = store();
    let source = folder.path().join("model.gguf");
    fs::write(&source, content().repeat(8)).expect("written");
    let stop = |done: u64| if done > 3 * MIB { Err(std::io::Error::other("stopped")) } else { Ok(()) };
    let file = fs::File::open(&source).expect("opened");
    assert!(matches!(store.put_open(&file, u64::MAX, stop), Err(PutError::Source(_))));
    assert!(matches!(store.put_link(&source, u64::MAX, stop), Err(PutError::Source(_))));
    assert!(matches!(store.put_open(&file, MIB, went), Err(PutError::TooLarge { .. })));
    assert_eq!(names(folder.path()), [source.display().to_string()]);
}

#[test]
fn a_file_that_the_disk_has_no_room_for_is_refused_before_it_is_copied() {
    let (folder, store) = store();
    let source = folder.path().join("model.gguf");
    let room = store.room_bytes().expect("told");
    // A hole takes no room; its copy might.
    fs::File::create(&source).and_then(|file| file.set_len(room + (64 << 30))).expect("a long file");
    let mut steps = 0;
    let outcome = store.put_open(&fs::File::open(&source).expect("opened"), u64::MAX, |_| {
        steps += 1;
        Err(std::io::Error::other("where it is shared, it is stopped here"))
    });
    match outcome {
        Err(PutError::NoSpace { bytes, .. }) => assert_eq!((bytes, steps), (room + (64 << 30), 0)),
        Err(PutError::Source(_)) => {}
        outcome => panic!("{outcome:?}"),
    }
    assert_eq!(names(folder.path()), [source.display().to_string()]);
}

#[test]
fn a_linked_file_takes_no_room_and_is_found_out_where_it_is_changed() {
    let (folder, store) = store();
    let (source, link) = (folder.path().join("blob"), folder.path().join("model.gguf"));
    fs::write(&source, content()).expect("written");
    std::os::unix::fs::symlink("blob", &link).expect("linked");
    for _ in 0..2 {
        let (stored, import) = store.put_link(&link, MIB, went).expect("put");
        assert_eq!((stored.digest, import), (Digest::of(&content()), Import::Linked));
        assert_eq!(read(&store, &stored.digest), content());
    }
    assert_eq!(names(&folder.path().join("incoming")), [""; 0]);
    assert!(!fs::metadata(&source).expect("it is there").permissions().readonly(), "it is as it was");
    fs::write(&source, b"changed in place").expect("written");
    assert!(matches!(store.open(&Digest::of(&content())), Err(OpenError::Mismatch { .. })));
}

#[test]
fn an_artifact_can_be_removed_and_leaves_its_source_alone() {
    let (folder, store) = store();
    let source = folder.path().join("download");
    fs::write(&source, content()).expect("written");
    let (stored, _) = store.put_link(&source, MIB, went).expect("put");
    assert_eq!(hash(&fs::File::open(&source).expect("opened"), went).expect("read"), stored);
    assert!(store.remove(&stored.digest).expect("removed"));
    assert!(!store.remove(&stored.digest).expect("not there") && !store.contains(&stored.digest));
    assert!(source.exists() && store.room_bytes().expect("told") > 0);
}

#[test]
fn an_artifact_belongs_to_its_owner_and_is_not_written_again() {
    let (folder, store) = store();
    let digest = store.put(&b"model"[..], MIB).expect("put").digest;
    let metadata = fs::metadata(path(folder.path(), &digest)).expect("it is there");
    assert!(metadata.permissions().readonly());
    #[cfg(unix)]
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o777, 0o400);
}

#[test]
fn an_artifact_that_differs_by_one_bit_is_refused_and_moved_aside() {
    let (folder, store) = store();
    let digest = store.put(&content()[..], MIB).expect("put").digest;
    let mut bent = content();
    bent[MIB as usize - 1] ^= 0x10;
    overwrite(folder.path(), &digest, &bent);
    let error = store.open(&digest).expect_err("one bit is enough");
    assert!(matches!(error, OpenError::Mismatch { found, .. } if found == Digest::of(&bent)), "{error}");
    let error = store.open(&digest).expect_err("it is gone");
    assert!(error.to_string().contains("was damaged") && error.to_string().contains("quarantine"), "{error}");
    assert_eq!(fs::read(folder.path().join("quarantine").join(digest.to_string())).expect("kept to look at"), bent);
    // Putting it again heals the store.
    store.put(&content()[..], MIB).expect("put");
    assert_eq!(read(&store, &digest), content());
}

#[test]
fn an_artifact_cut_short_or_grown_is_refused() {
    for bytes in [content()[..MIB as usize - 1].to_vec(), [content(), vec![0]].concat(), Vec::new()] {
        let (folder, store) = store();
        let digest = store.put(&content()[..], MIB).expect("put").digest;
        overwrite(folder.path(), &digest, &bytes);
        assert!(matches!(store.open(&digest), Err(OpenError::Mismatch { .. })));
    }
}

#[test]
fn an_artifact_under_anothers_name_is_refused() {
    let (folder, store) = store();
    let digest = store.put(&b"good"[..], MIB).expect("put").digest;
    let evil = store.put(&b"evil"[..], MIB).expect("put").digest;
    fs::rename(path(folder.path(), &evil), path(folder.path(), &digest)).expect("swapped");
    assert!(matches!(store.open(&digest), Err(OpenError::Mismatch { found, .. }) if found == evil));
}

#[test]
fn a_swap_after_the_opening_does_not_reach_the_reader() {
    let (folder, store) = store();
    let digest = store.put(&b"good"[..], MIB).expect("put").digest;
    let mut opened = store.open(&digest).expect("it verifies");
    overwrite(folder.path(), &digest, b"evil");
    let mut text = String::new();
    opened.file.read_to_string(&mut text).expect("it reads");
    assert_eq!(text, "good");
}

#[test]
fn what_is_not_there_is_missing() {
    let (_folder, store) = store();
    let digest = Digest::of(b"nowhere");
    assert!(!store.contains(&digest));
    assert!(matches!(store.open(&digest), Err(OpenError::Missing { digest: missing, .. }) if missing == digest));
}

#[cfg(unix)]
#[test]
fn a_link_or_a_folder_under_an_artifacts_name_is_not_followed() {
    let (folder, store) = store();
    let digest = store.put(&b"good"[..], MIB).expect("put").digest;
    let file = path(folder.path(), &digest);
    let elsewhere = folder.path().join("elsewhere");
    fs::rename(&file, &elsewhere).expect("moved");
    std::os::unix::fs::symlink(&elsewhere, &file).expect("linked");
    assert!(matches!(store.open(&digest), Err(OpenError::Read { .. })));
    fs::remove_file(&file).expect("removed");
    fs::create_dir(&file).expect("made");
    assert!(matches!(store.open(&digest), Err(OpenError::Read { .. })));
}

#[test]
fn more_bytes_than_allowed_are_not_kept() {
    let (folder, store) = store();
    assert!(matches!(store.put(&content()[..], MIB - 1), Err(PutError::TooLarge { .. })));
    assert!(!store.contains(&Digest::of(&content())));
    assert_eq!(fs::read_dir(folder.path().join("incoming")).expect("it is there").count(), 0);
}

#[test]
fn puts_of_the_same_artifact_at_once_all_succeed() {
    let (folder, store) = store();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let store = &store;
            scope.spawn(move || {
                for round in 0..8_u8 {
                    let shared = store.put(&content()[..], MIB).expect("put").digest;
                    assert_eq!(read(store, &shared).len(), MIB as usize);
                    let own = store.put(&[thread, round][..], MIB).expect("put").digest;
                    assert_eq!(read(store, &own), [thread, round]);
                }
            });
        }
    });
    assert_eq!(fs::read_dir(folder.path().join("incoming")).expect("it is there").count(), 0);
}

#[test]
fn what_a_crash_left_half_written_is_cleared_away_and_what_is_being_written_is_not() {
    let (folder, _store) = store();
    let left = folder.path().join("incoming/1-0");
    fs::write(&left, b"half").expect("written");
    let busy_path = folder.path().join("incoming/1-1");
    let mut busy = fs::File::create(&busy_path).expect("made");
    busy.lock().expect("locked");
    busy.write_all(b"half").expect("written");
    ArtifactStore::in_folder(folder.path()).expect("a store");
    assert!(!left.exists());
    assert!(busy_path.exists());
}

#[test]
fn an_embedded_artifact_is_verified_and_cannot_be_changed() {
    let (_folder, store) = store();
    let bytes: &'static [u8] = b"a tiny model";
    let digest = Digest::of(bytes);
    let store = store.with_embedded(digest, bytes);
    assert!(store.contains(&digest));
    assert_eq!(read(&store, &digest), bytes);
    let mut opened = store.open(&digest).expect("it verifies");
    if cfg!(target_os = "linux") {
        assert!(opened.file.write_all(b"x").is_err());
    }
}

#[test]
fn an_embedded_artifact_under_a_wrong_digest_is_refused() {
    let (_folder, store) = store();
    let digest = Digest::of(b"another");
    let store = store.with_embedded(digest, b"a tiny model");
    assert!(matches!(store.open(&digest), Err(OpenError::Mismatch { .. })));
}

/// Opens what there is of an artifact, which nobody else writes.
fn partial(store: &ArtifactStore, digest: &Digest) -> Partial {
    store.partial(digest).expect("it opens").expect("nobody else has it")
}

#[test]
fn what_comes_piece_by_piece_goes_on_where_it_ended_and_counts_once_it_is_whole() {
    let (folder, store) = store();
    let (bytes, digest) = (content(), Digest::of(&content()));
    let mut first = partial(&store, &digest);
    first.append(&bytes[..1_000]).expect("written");
    assert!(store.partial(&digest).expect("it looks").is_none(), "one writer at a time");
    drop(first);
    // Another process, or the next start.
    let store = ArtifactStore::in_folder(folder.path()).expect("a store");
    assert_eq!((store.partial_bytes(&digest), store.partials().expect("listed")), (1_000, vec![digest]));
    let mut second = partial(&store, &digest);
    assert_eq!(second.bytes(), 1_000);
    second.append(&bytes[1_000..]).expect("written");
    assert!(!store.contains(&digest));
    second.finish().expect("it verifies");
    assert_eq!(read(&store, &digest), bytes);
    assert!(store.partials().expect("listed").is_empty());
}

#[cfg(unix)]
#[test]
fn a_process_that_ends_while_it_completes_an_artifact_costs_nothing() {
    use std::os::unix::fs::PermissionsExt as _;
    let (folder, store) = store();
    let (bytes, digest) = (content(), Digest::of(&content()));
    partial(&store, &digest).append(&bytes).expect("written");
    // As far as that it had made the file one that nobody writes.
    let path = folder.path().join("partial").join(digest.to_string());
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).expect("set");
    partial(&store, &digest).finish().expect("the next process completes it");
    assert_eq!(read(&store, &digest), bytes);
}

#[test]
fn what_is_brought_to_the_machine_while_it_is_fetched_is_the_machines_own() {
    let (_folder, store) = store();
    let (bytes, digest) = (content(), Digest::of(&content()));
    let mut fetching = partial(&store, &digest);
    fetching.append(&bytes).expect("written");
    store.put(&bytes[..], u64::MAX).expect("put");
    fetching.finish().expect("it is there");
    assert!(fetched(&store).is_empty() && store.partials().expect("listed").is_empty());
    assert!(!store.evict(&digest).expect("asked") && store.contains(&digest));
}

#[test]
fn wrong_bytes_are_dropped_and_never_count() {
    let (_folder, store) = store();
    let digest = Digest::of(&content());
    let mut partial = partial(&store, &digest);
    partial.append(b"something else").expect("written");
    let refused = partial.finish().expect_err("other bytes");
    assert!(matches!(refused, FinishError::Mismatch { found } if found == Digest::of(b"something else")));
    assert!(!store.contains(&digest) && store.partial_bytes(&digest) == 0);
    partial.append(&content()).expect("written");
    partial.finish().expect("the right ones");
    assert!(store.contains(&digest));
}

/// Has the store fetch an artifact.
fn fetch(store: &ArtifactStore, bytes: &[u8]) -> Digest {
    let digest = Digest::of(bytes);
    let mut partial = partial(store, &digest);
    partial.append(bytes).expect("written");
    partial.finish().expect("it verifies");
    digest
}

fn fetched(store: &ArtifactStore) -> Vec<Digest> {
    store.fetched().expect("listed").iter().map(|fetched| fetched.digest).collect()
}

#[test]
fn what_was_fetched_is_listed_by_its_last_use_and_leaves_only_unused() {
    let (folder, store) = store();
    let [one, two] = [b"one", b"two"].map(|bytes| fetch(&store, bytes));
    let own = store.put(&b"own"[..], 3).expect("put").digest;
    assert_eq!(fetched(&store), [one, two]);
    let held = store.in_use(&one).expect("noted").expect("it was fetched");
    assert_eq!(fetched(&store), [two, one]);
    assert!(store.in_use(&own).expect("noted").is_none());
    // Another worker of this machine.
    let other = ArtifactStore::in_folder(folder.path()).expect("a store");
    assert!(!other.evict(&one).expect("looked at"), "it is in use");
    assert!(!other.evict(&own).expect("looked at"), "it is this machine's own");
    assert!(other.evict(&two).expect("looked at"));
    drop(held);
    assert!(other.evict(&one).expect("looked at"));
    assert!(!store.contains(&one) && !store.contains(&two) && store.contains(&own));
    assert!(fetched(&store).is_empty());
}

#[test]
fn what_is_brought_to_this_machine_or_kept_counts_as_fetched_no_more() {
    let (_folder, store) = store();
    let [one, two] = [b"one", b"two"].map(|bytes| fetch(&store, bytes));
    store.put(&b"one"[..], 3).expect("put");
    assert_eq!(fetched(&store), [two]);
    store.unmark(&two).expect("kept");
    assert!(fetched(&store).is_empty());
    assert!(!store.evict(&one).expect("looked at") && store.contains(&one) && store.contains(&two));
}
