//! The records of the index: each namespace has a log of writes, which readers see after a delay.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::asked::{
    DeleteSelection, FetchByMetadata, LimitResult, Parameters, Query, Update, Write, namespace_or_default,
};
use super::metadata_filter;
use super::record::Record;

/// A namespace: the records that readers see, and the writes that they do not see yet.
#[derive(Default)]
struct Namespace {
    records: BTreeMap<String, Record>,
    log: VecDeque<(Instant, u64, Write)>,
    written: u64,
    seen: u64,
}

/// All namespaces.
#[derive(Default)]
pub(super) struct Log {
    namespaces: BTreeMap<String, Namespace>,
    /// How long a write takes until readers see it.
    pub(super) delay: Duration,
}

impl Namespace {
    fn settle(&mut self, now: Instant) {
        while self.log.front().is_some_and(|(due, ..)| *due <= now)
            && let Some((_, lsn, write)) = self.log.pop_front()
        {
            self.seen = lsn;
            match write {
                Write::Upsert { records, .. } => self.records.extend(records),
                Write::Delete { selection: DeleteSelection::Ids(ids), .. } => {
                    for id in &ids {
                        self.records.remove(id);
                    }
                }
                Write::Delete { selection: DeleteSelection::All, .. } => self.records.clear(),
                Write::Delete { selection: DeleteSelection::Filter(wanted), .. } => {
                    self.records.retain(|_, record| {
                        !metadata_filter::matches(&wanted, &record.metadata).unwrap_or(false)
                    });
                }
                Write::Update(update) => self.update(update),
            }
        }
    }

    /// Merges metadata. Does nothing if the id does not exist.
    fn update(&mut self, update: Update) {
        if let Some(record) = self.records.get_mut(&update.id) {
            if let Some(values) = update.values {
                record.values = values;
            }
            record.metadata.extend(update.set_metadata);
        }
    }
}

impl Log {
    /// Adds a write to the namespace's log. Returns its position.
    pub(super) fn apply(&mut self, write: Write) -> u64 {
        let now = Instant::now();
        let due = now + self.delay;
        let namespace = self.namespaces.entry(write.namespace().to_owned()).or_default();
        namespace.written += 1;
        let lsn = namespace.written;
        namespace.log.push_back((due, lsn, write));
        namespace.settle(now);
        lsn
    }

    pub(super) fn clear(&mut self) {
        self.namespaces.clear();
    }

    pub(super) fn contains(&self, namespace: &str) -> bool {
        self.namespaces.contains_key(namespace_or_default(namespace))
    }

    /// The log position that readers have reached, and the records at this position.
    fn read(&mut self, namespace: &str) -> Option<(u64, &BTreeMap<String, Record>)> {
        let namespace = self.namespaces.get_mut(namespace_or_default(namespace))?;
        namespace.settle(Instant::now());
        Some((namespace.seen, &namespace.records))
    }

    pub(super) fn snapshot(&mut self, namespace: &str) -> BTreeMap<String, Record> {
        self.read(namespace).map(|(_, records)| records.clone()).unwrap_or_default()
    }

    pub(super) fn seen(&mut self, namespace: &str) -> u64 {
        self.read(namespace).map_or(0, |(seen, _)| seen)
    }

    pub(super) fn fetch(&mut self, asked: &Parameters) -> Value {
        let records = self.read(&asked.namespace).map(|(_, records)| records);
        let found = asked.ids.iter().filter_map(|id| Some((id, records?.get(id)?)));
        let vectors: Map<String, Value> =
            found.map(|(id, record)| (id.clone(), vector(id, record))).collect();
        json!({ "vectors": vectors, "namespace": asked.namespace, "usage": { "readUnits": 1 } })
    }

    pub(super) fn fetch_by_metadata(&mut self, asked: &FetchByMetadata) -> LimitResult<Value> {
        let mut vectors = Map::new();
        let mut next = None;
        for (id, record) in self.read(&asked.namespace).into_iter().flat_map(|(_, records)| records) {
            let is_after = asked.pagination_token.as_ref().is_none_or(|after| id > after);
            if !is_after || !metadata_filter::matches(&asked.filter, &record.metadata)? {
                continue;
            }
            if vectors.len() == asked.limit {
                next = vectors.keys().next_back().cloned();
                break;
            }
            vectors.insert(id.clone(), vector(id, record));
        }
        let mut answer =
            json!({ "vectors": vectors, "namespace": asked.namespace, "usage": { "readUnits": 1 } });
        if let Some(next) = next {
            answer["pagination"] = json!({ "next": next });
        }
        Ok(answer)
    }

    pub(super) fn list(&mut self, asked: &Parameters) -> Value {
        // A map of strings is in bitwise order, like Pinecone's listing.
        let mut left = self
            .read(&asked.namespace)
            .into_iter()
            .flat_map(|(_, records)| records.keys())
            .filter(|id| id.starts_with(&asked.prefix))
            .filter(|id| asked.after.as_ref().is_none_or(|after| *id > after))
            .peekable();
        let ids: Vec<&String> = left.by_ref().take(asked.limit).collect();
        let mut answer = json!({
            "vectors": ids.iter().map(|id| json!({ "id": id })).collect::<Vec<_>>(),
            "namespace": asked.namespace,
            "usage": { "readUnits": 1 },
        });
        if left.peek().is_some() {
            answer["pagination"] = json!({ "next": ids.last() });
        }
        answer
    }

    pub(super) fn query(&mut self, asked: &Query, vector: &[f32]) -> LimitResult<Value> {
        let mut matches: Vec<(f64, &String, &Record)> = Vec::new();
        for (id, record) in self.read(&asked.namespace).into_iter().flat_map(|(_, records)| records) {
            if metadata_filter::matches(&asked.filter, &record.metadata)? {
                matches.push((cosine(vector, &record.values), id, record));
            }
        }
        matches.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1)));
        let matches: Vec<Value> = matches
            .into_iter()
            .take(asked.top_k)
            .map(|(score, id, record)| {
                let values = if asked.include_values { record.values.as_slice() } else { &[] };
                let mut found = json!({ "id": id, "score": score, "values": values });
                if asked.include_metadata {
                    found["metadata"] = record.metadata.clone().into();
                }
                found
            })
            .collect();
        Ok(json!({ "matches": matches, "namespace": asked.namespace, "usage": { "readUnits": 1 } }))
    }

    /// The vector of a record, for a search by id.
    pub(super) fn values(&mut self, namespace: &str, id: &str) -> Option<Vec<f32>> {
        Some(self.read(namespace)?.1.get(id)?.values.clone())
    }

    pub(super) fn stats(&mut self, dimensions: usize) -> Value {
        let counts = self.counts();
        let total: usize = counts.values().sum();
        let namespaces: Map<String, Value> =
            counts.into_iter().map(|(name, count)| (name, json!({ "vectorCount": count }))).collect();
        json!({
            "namespaces": namespaces,
            "dimension": dimensions,
            "indexFullness": 0,
            "totalVectorCount": total,
            "metric": "cosine",
            "vectorType": "dense",
        })
    }

    /// The number of records in each namespace.
    pub(super) fn counts(&mut self) -> BTreeMap<String, usize> {
        let now = Instant::now();
        self.namespaces
            .iter_mut()
            .map(|(name, namespace)| {
                namespace.settle(now);
                (name.clone(), namespace.records.len())
            })
            .collect()
    }

    pub(super) fn remove(&mut self, namespace: &str) -> bool {
        self.namespaces.remove(namespace_or_default(namespace)).is_some()
    }

    pub(super) fn add(&mut self, namespace: &str) {
        self.namespaces.entry(namespace_or_default(namespace).to_owned()).or_default();
    }
}

fn vector(id: &str, record: &Record) -> Value {
    json!({ "id": id, "values": record.values, "metadata": record.metadata })
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
