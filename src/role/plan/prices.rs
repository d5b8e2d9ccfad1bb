//! Prices: `config/prices.toml`, or a file of that form.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use serde::Deserialize;

/// The prices that are built in.
const DEFAULTS: &str = include_str!("../../../config/prices.toml");

/// Prices of one region, in dollars.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Prices {
    pub(super) fargate_vcpu_hour: f64,
    pub(super) fargate_gb_hour: f64,
    pub(super) sqs_million_requests: f64,
    pub(super) rds_gb_month: f64,
    pub(super) pinecone_million_write_units: f64,
    pub(super) pinecone_million_read_units: f64,
    pub(super) pinecone_gb_month: f64,
    pub(super) pinecone_month_minimum: f64,
    rds: BTreeMap<String, Instance>,
    /// The file, as people know it.
    #[serde(skip)]
    source: String,
}

/// An instance of the database.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Instance {
    pub(super) vcpus: u32,
    pub(super) hour: f64,
    /// The year, if the price was remembered and not read.
    from_memory: Option<u16>,
}

impl Prices {
    /// The prices of a region: from a file, or else those that are built in.
    pub(super) fn read(file: Option<&Path>, region: &str) -> anyhow::Result<Self> {
        let (name, text) = match file {
            Some(path) => {
                let text = std::fs::read_to_string(path);
                (
                    path.display().to_string(),
                    text.with_context(|| format!("cannot read the price file {}", path.display()))?,
                )
            }
            None => ("the built-in prices".to_owned(), DEFAULTS.to_owned()),
        };
        let mut regions: BTreeMap<String, Self> = toml::from_str(&text)
            .with_context(|| format!("{name} is not a price file; config/prices.toml shows the form"))?;
        for (region, prices) in &regions {
            prices.check().with_context(|| format!("{name}, region {region}"))?;
        }
        let known = regions.keys().cloned().collect::<Vec<_>>().join(", ");
        let mut prices = regions.remove(region).with_context(|| {
            format!("{name} has no region {region}, only {known}: add it to a copy of config/prices.toml and name that by --prices")
        })?;
        prices.source = file.map_or_else(|| "config/prices.toml".into(), |path| path.display().to_string());
        Ok(prices)
    }

    /// That prices are to be checked, and which of these classes' prices first.
    pub(super) fn note<'a>(&self, classes: impl IntoIterator<Item = &'a str>) -> String {
        let mut remembered: Vec<String> = classes
            .into_iter()
            .filter_map(|class| Some(format!("{class} ({})", self.rds.get(class)?.from_memory?)))
            .collect();
        remembered.dedup();
        let source = &self.source;
        let mut note =
            format!("Prices change: check them before you rely on this. {source} says when each was read.");
        if !remembered.is_empty() {
            // Writing to a string can't fail.
            let _ = write!(note, " From memory: {}.", remembered.join(", "));
        }
        note
    }

    /// The instance of a class.
    pub(super) fn instance(&self, class: &str) -> anyhow::Result<Instance> {
        let known = || self.rds.keys().cloned().collect::<Vec<_>>().join(", ");
        let found = self.rds.get(class).copied();
        found.with_context(|| {
            format!("--database-class {class}: the price file has no such class, only {}", known())
        })
    }

    /// The cheapest class with so many virtual CPUs, or else the one with most.
    pub(super) fn class_with(&self, vcpus: f64) -> Option<(&str, Instance)> {
        let classes = || self.rds.iter().map(|(class, instance)| (class.as_str(), *instance));
        let cheaper = |a: &(&str, Instance), b: &(&str, Instance)| a.1.hour.total_cmp(&b.1.hour);
        let enough = classes().filter(|(_, instance)| f64::from(instance.vcpus) >= vcpus).min_by(cheaper);
        enough.or_else(|| classes().max_by_key(|(_, instance)| instance.vcpus))
    }

    fn check(&self) -> anyhow::Result<()> {
        let prices = [
            self.fargate_vcpu_hour,
            self.fargate_gb_hour,
            self.sqs_million_requests,
            self.rds_gb_month,
            self.pinecone_million_write_units,
            self.pinecone_million_read_units,
            self.pinecone_gb_month,
            self.pinecone_month_minimum,
        ];
        let of_rds = self.rds.values().map(|instance| instance.hour);
        if let Some(price) = prices.into_iter().chain(of_rds).find(|price| !price.is_finite() || *price < 0.0)
        {
            anyhow::bail!("{price} is not a price: use dollars, 0 or more");
        }
        anyhow::ensure!(!self.rds.is_empty(), "there is no class of RDS");
        anyhow::ensure!(self.rds.values().all(|instance| instance.vcpus > 0), "a class of RDS has no vcpus");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_prices_are_prices() {
        let prices = Prices::read(None, "us-east-1").unwrap();
        assert_eq!(prices.instance("db.m7g.2xlarge").unwrap().vcpus, 8);
        assert_eq!(prices.class_with(9.0).unwrap().0, "db.m7g.4xlarge");
        assert_eq!(prices.class_with(1e6).unwrap().0, "db.m7g.16xlarge");
        assert!(prices.instance("db.none").unwrap_err().to_string().contains("db.m7g.large"));
        let note = prices.note(["db.m7g.2xlarge", "db.m7g.2xlarge", "db.t4g.medium"]);
        assert!(
            note.contains("config/prices.toml says when each was read. From memory: db.m7g.2xlarge (2025)."),
            "{note}"
        );
        assert!(!prices.note(["db.t4g.medium"]).contains("memory"));
        let error = Prices::read(None, "mars-1").unwrap_err().to_string();
        assert!(error.contains("us-east-1"), "{error}");
    }

    #[test]
    fn a_price_file_is_read_and_a_wrong_one_is_refused_with_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mine.toml");
        let with = |from: &str, to: &str| {
            std::fs::write(&path, DEFAULTS.replace(from, to)).unwrap();
            Prices::read(Some(&path), "us-east-1").map_err(|error| format!("{error:#}"))
        };
        assert!((with("= 0.40", "= 7.5").unwrap().sqs_million_requests - 7.5).abs() < 1e-9);
        assert!(with("= 0.40", "= -1.0").unwrap_err().contains("-1 is not a price"));
        assert!(with("sqs_million_requests", "sqs_requests").unwrap_err().contains("mine.toml"));
    }
}
