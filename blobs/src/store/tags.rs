//! Tags: names that pin a model.

use redb::{ReadableTable, ReadableTableMetadata, TableDefinition, WriteTransaction};

use super::{MODELS, Store, StoreError, database};
use crate::Hash;

pub(super) const TAGS: TableDefinition<'_, &str, &[u8; 32]> = TableDefinition::new("tags");

/// The most tags in a store.
pub const MAX_TAGS: u64 = 4096;

/// The longest tag, in bytes.
pub const MAX_TAG: usize = 128;

/// A tag, and the model that it pins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag {
    /// Name of the tag.
    pub name: String,
    /// The model's id.
    pub model: Hash,
}

fn check(name: &str) -> Result<(), StoreError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-/:@".contains(c);
    let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    match begins && name.len() <= MAX_TAG && name.chars().all(allowed) {
        true => Ok(()),
        false => Err(StoreError::BadTag(name.chars().take(MAX_TAG).collect())),
    }
}

/// Returns the tags of a model, sorted.
pub(super) fn tags_of(txn: &WriteTransaction, id: &Hash) -> Result<Vec<String>, StoreError> {
    let table = txn.open_table(TAGS).map_err(database)?;
    let tags = collect(&table)?.into_iter();
    let of_model = tags.filter(|tag| tag.model == *id);
    Ok(of_model.map(|tag| tag.name).collect())
}

fn collect(
    table: &impl ReadableTable<&'static str, &'static [u8; 32]>,
) -> Result<Vec<Tag>, StoreError> {
    let mut tags = Vec::new();
    for row in table.iter().map_err(database)? {
        let (name, model) = row.map_err(database)?;
        tags.push(Tag {
            name: name.value().to_owned(),
            model: (*model.value()).into(),
        });
    }
    Ok(tags)
}

impl Store {
    /// Pins a model under a tag: it is not removed, collected or evicted until the tag is removed. Tagging the same
    /// model again changes nothing. Durable on return.
    ///
    /// # Errors
    /// [`StoreError::NoSuchModel`]; [`StoreError::BadTag`]; [`StoreError::TagTaken`] if the tag pins another model;
    /// [`StoreError::TooManyTags`].
    pub fn tag(&self, name: &str, id: &Hash) -> Result<(), StoreError> {
        check(name)?;
        let _no_deletion = self.block_deletion();
        self.write(|txn| {
            let models = txn.open_table(MODELS).map_err(database)?;
            if models.get(id.as_bytes()).map_err(database)?.is_none() {
                return Err(StoreError::NoSuchModel(*id));
            }
            let mut table = txn.open_table(TAGS).map_err(database)?;
            let known = table.get(name).map_err(database)?;
            match known.map(|known| Hash::from(*known.value())) {
                Some(known) if known == *id => return Ok(()),
                Some(model) => {
                    return Err(StoreError::TagTaken {
                        tag: name.to_owned(),
                        model,
                    });
                }
                None if table.len().map_err(database)? >= MAX_TAGS => {
                    return Err(StoreError::TooManyTags);
                }
                None => {}
            }
            table.insert(name, id.as_bytes()).map_err(database)?;
            Ok(())
        })
    }

    /// Removes a tag, and returns the model that it pinned. Durable on return.
    ///
    /// # Errors
    /// [`StoreError::NoSuchTag`].
    pub fn untag(&self, name: &str) -> Result<Hash, StoreError> {
        self.write(|txn| {
            let mut table = txn.open_table(TAGS).map_err(database)?;
            let known = table.remove(name).map_err(database)?;
            match known {
                Some(known) => Ok((*known.value()).into()),
                None => Err(StoreError::NoSuchTag(name.chars().take(MAX_TAG).collect())),
            }
        })
    }

    /// Returns the tags of a model, sorted.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn tags_of(&self, id: &Hash) -> Result<Vec<String>, StoreError> {
        let tags = self.tags()?.into_iter();
        let of_model = tags.filter(|tag| tag.model == *id);
        Ok(of_model.map(|tag| tag.name).collect())
    }

    /// Returns all tags, sorted by name.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn tags(&self) -> Result<Vec<Tag>, StoreError> {
        self.read(|txn| collect(&txn.open_table(TAGS).map_err(database)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing::{add, store};

    #[test]
    fn a_tagged_model_stays_until_its_last_tag_is_gone() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let one = add(&store, &home.path().join("1"), &[1; 100]);
        let two = add(&store, &home.path().join("2"), &[2; 100]);
        store.tag("prod", &one).unwrap();
        store.tag("prod", &one).unwrap();
        store.tag("prod/eu", &one).unwrap();
        let error = store.tag("prod", &two).unwrap_err();
        assert!(matches!(error, StoreError::TagTaken { .. }), "{error}");
        let error = store.remove(&one, false).unwrap_err();
        assert!(error.to_string().contains("prod, prod/eu"), "{error}");
        assert_eq!(store.untag("prod").unwrap(), one);
        store.remove(&one, false).unwrap_err();
        drop(store);
        let store = self::store(&home);
        assert_eq!(store.tags().unwrap().len(), 1);
        store.untag("prod/eu").unwrap();
        assert!(matches!(
            store.untag("prod/eu"),
            Err(StoreError::NoSuchTag(_))
        ));
        store.remove(&one, false).unwrap();
        assert!(matches!(
            store.tag("gone", &one),
            Err(StoreError::NoSuchModel(_))
        ));
    }

    #[test]
    fn tags_are_bounded_in_length_letters_and_number() {
        let home = tempfile::tempdir().unwrap();
        let store = store(&home);
        let id = add(&store, &home.path().join("1"), &[1; 100]);
        for bad in ["", "-a", "a b", "a\n", "ä", &"a".repeat(MAX_TAG + 1)] {
            let error = store.tag(bad, &id).unwrap_err();
            assert!(matches!(error, StoreError::BadTag(_)), "{bad:?}: {error}");
        }
        store.tag(&"a".repeat(MAX_TAG), &id).unwrap();
        store
            .write(|txn| {
                let mut table = txn.open_table(TAGS).map_err(database)?;
                for i in 1..MAX_TAGS {
                    let name = format!("t{i}");
                    table
                        .insert(name.as_str(), id.as_bytes())
                        .map_err(database)?;
                }
                Ok(())
            })
            .unwrap();
        let error = store.tag("one-too-many", &id).unwrap_err();
        assert!(matches!(error, StoreError::TooManyTags), "{error}");
    }
}
