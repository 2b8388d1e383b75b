//! Values, paths and edits on Automerge documents.

use serde_json::json;

use super::*;

fn path(text: &str) -> Path {
    Path::parse(text).unwrap()
}

fn edited(edits: &[Edit]) -> Result<Value, EditError> {
    let mut doc = Automerge::new();
    let mut tx = doc.transaction();
    for edit in edits {
        apply(&mut tx, edit)?;
    }
    tx.commit();
    Ok(get(&doc, &Path::default()).unwrap())
}

#[test]
fn pointers_are_read_and_written() {
    for text in ["", "/a", "/a~1b/~0", "/", "/0/-"] {
        assert_eq!(path(text).to_pointer(), text);
    }
    assert_eq!(Path::parse("a"), Err(PathError::NoSlash("a".to_owned())));
    assert_eq!(Path::parse("/~2"), Err(PathError::Escape("/~2".to_owned())));
    assert!(matches!(
        Path::parse(&"/a".repeat(33)),
        Err(PathError::TooDeep(_))
    ));
}

#[test]
fn values_are_read_as_they_were_written() {
    let value =
        json!({"a": [1, 2.5, {"b": null}], "t": "text", "u": u64::MAX, "n": -1, "f": false});
    let put = Edit::Put(path("/x"), value.clone());
    assert_eq!(edited(&[put]), Ok(json!({ "x": value })));
}

#[test]
fn edits_change_the_value_at_their_path() {
    let list = Edit::Put(path("/l"), json!([1, 2, 3]));
    let edits = [
        list,
        Edit::Insert(path("/l/0"), json!(0)),
        Edit::Insert(path("/l/-"), json!([])),
        Edit::Put(path("/l/4/-"), json!("x")),
        Edit::Delete(path("/l/1")),
        Edit::Increment(path("/c"), 5),
        Edit::Increment(path("/c"), -2),
    ];
    assert_eq!(edited(&edits), Ok(json!({"l": [0, 2, 3, ["x"]], "c": 3})));
}

#[test]
fn edits_that_do_not_fit_return_the_reason() {
    let wrong = |edit: Edit| {
        let base = Edit::Put(path("/m"), json!({"l": [1], "n": 1}));
        edited(&[base, edit]).unwrap_err()
    };
    assert_eq!(wrong(Edit::Put(path(""), json!(1))), EditError::Root);
    assert_eq!(
        wrong(Edit::Put(path("/x/y"), json!(1))),
        EditError::NoContainer(path("/x"))
    );
    assert_eq!(
        wrong(Edit::Put(path("/m/l/2"), json!(1))),
        EditError::Index(path("/m/l/2"))
    );
    assert_eq!(
        wrong(Edit::Delete(path("/m/x"))),
        EditError::NotFound(path("/m/x"))
    );
    assert_eq!(
        wrong(Edit::Delete(path("/m/l/1"))),
        EditError::NotFound(path("/m/l/1"))
    );
    assert_eq!(
        wrong(Edit::Increment(path("/m/n"), 1)),
        EditError::NoCounter(path("/m/n"))
    );
    assert_eq!(
        wrong(Edit::Insert(path("/m/x"), json!(1))),
        EditError::NoList(path("/m"))
    );
    assert_eq!(wrong(Edit::Put(path("/m/"), json!(1))), EditError::Key(0));
    let full = [
        Edit::Increment(path("/c"), i64::MAX),
        Edit::Increment(path("/c"), 1),
    ];
    assert_eq!(edited(&full), Err(EditError::Range(path("/c"))));
    let deep = (0..40).fold(json!(1), |value, _| json!([value]));
    let deep = [Edit::Put(path("/d"), deep)];
    assert_eq!(check(&deep), Err(EditError::TooDeep(path("/d"))));
    let long = [Edit::Put(path("/d"), json!("x".repeat(MAX_CHANGE)))];
    assert_eq!(check(&long), Err(EditError::TooMuch));
}

#[test]
fn a_difference_becomes_edits_that_reproduce_it() {
    let mut doc = Automerge::new();
    let mut tx = doc.transaction();
    apply(
        &mut tx,
        &Edit::Put(path(""), json!({"l": [1, 2, 3], "m": {"a": 1}, "x": 1})),
    )
    .unwrap();
    apply(&mut tx, &Edit::Increment(path("/c"), 5)).unwrap();
    tx.commit();
    let (before, mut other) = (doc.get_heads(), doc.fork());
    let mut tx = doc.transaction();
    for edit in [
        Edit::Delete(path("/l/0")),
        Edit::Insert(path("/l/-"), json!({"deep": [1]})),
        Edit::Put(path("/m/b"), json!([{"c": 1}])),
        Edit::Delete(path("/x")),
        Edit::Increment(path("/c"), 2),
        Edit::Increment(path("/d"), 7),
    ] {
        apply(&mut tx, &edit).unwrap();
    }
    tx.commit();
    let edits = edits_of(&doc, &before, &doc.get_heads());
    let mut tx = other.transaction();
    for edit in &edits {
        apply(&mut tx, edit).unwrap();
    }
    tx.commit();
    assert_eq!(get(&other, &Path::default()), get(&doc, &Path::default()));
}
