//! Reads expressions of `PromQL` as far as it takes to know which metrics, labels and values they name, and compares them
//! with a scrape.

use std::collections::{BTreeMap, BTreeSet};

/// Labels that Prometheus adds to each sample.
const ADDED: [&str; 2] = ["job", "instance"];

/// Words before a list of labels in parentheses.
const GROUPING: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];

/// Other words that are no metric.
const WORDS: [&str; 7] = ["and", "or", "unless", "bool", "offset", "inf", "nan"];

/// A matcher of a label: label, operator, value.
type Matcher = (String, String, String);

/// What an expression names.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Named {
    /// Metrics with their matchers.
    pub selectors: Vec<(String, Vec<Matcher>)>,
    /// Labels by which is grouped.
    pub grouping: BTreeSet<String>,
}

struct Reader<'a>(&'a str);

impl<'a> Reader<'a> {
    fn take(&mut self, is: impl Fn(char) -> bool) -> &'a str {
        let end = self.0.find(|c| !is(c)).unwrap_or(self.0.len());
        let (taken, rest) = self.0.split_at(end);
        self.0 = rest;
        taken
    }

    fn skip_space(&mut self) {
        self.take(char::is_whitespace);
    }

    fn word(&mut self) -> &'a str {
        self.take(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':')
    }

    /// Everything up to a character, which is taken too.
    fn until(&mut self, end: char) -> &'a str {
        let (taken, rest) = self.0.split_once(end).unwrap_or_else(|| panic!("no {end:?} in {}", self.0));
        self.0 = rest;
        taken
    }

    /// Whether what comes shows that the word before was a function: an argument, or the labels of an aggregation.
    fn is_after_function(&self) -> bool {
        ["(", "by ", "by(", "without ", "without("].iter().any(|next| self.0.starts_with(next))
    }

    fn matchers(&mut self) -> Vec<Matcher> {
        let mut matchers = Vec::new();
        loop {
            self.take(|c| c.is_whitespace() || c == ',');
            if self.0.starts_with('}') {
                self.until('}');
                return matchers;
            }
            let label = self.word().to_owned();
            self.skip_space();
            let operator = self.take(|c| "=!~".contains(c)).to_owned();
            self.skip_space();
            assert!(self.0.starts_with('"'), "a matcher without a value: {}", self.0);
            self.until('"');
            matchers.push((label, operator, self.until('"').to_owned()));
        }
    }
}

/// What an expression names.
pub fn read(expression: &str) -> Named {
    let mut named = Named::default();
    if let Some(rest) = expression.strip_prefix("label_values(") {
        let (metric, label) = rest.trim_end_matches(')').split_once(',').unwrap();
        named.selectors.push((metric.trim().to_owned(), Vec::new()));
        named.grouping.insert(label.trim().to_owned());
        return named;
    }
    let mut reader = Reader(expression);
    while let Some(next) = reader.0.chars().next() {
        match next {
            '"' => {
                reader.until('"');
                reader.until('"');
            }
            '[' => drop(reader.until(']')),
            // A number, or a duration.
            '0'..='9' => drop(reader.take(|c| c.is_ascii_alphanumeric() || c == '.')),
            '$' => {
                reader.until('$');
                reader.word();
            }
            _ if next.is_ascii_alphabetic() || next == '_' || next == ':' => {
                let word = reader.word();
                reader.skip_space();
                if GROUPING.contains(&word) {
                    if reader.0.starts_with('(') {
                        reader.until('(');
                        let labels = reader.until(')').split(',').map(|label| label.trim().to_owned());
                        named.grouping.extend(labels.filter(|label| !label.is_empty()));
                    }
                } else if !reader.is_after_function() && !WORDS.contains(&word.to_lowercase().as_str()) {
                    let has_matchers = reader.0.starts_with('{');
                    if has_matchers {
                        reader.until('{');
                    }
                    let matchers = if has_matchers { reader.matchers() } else { Vec::new() };
                    named.selectors.push((word.to_owned(), matchers));
                }
            }
            _ => reader.0 = &reader.0[next.len_utf8()..],
        }
    }
    named
}

/// Labels of samples, by the name of the sample.
#[derive(Default)]
pub struct Scrape(pub BTreeMap<String, Vec<BTreeMap<String, String>>>);

impl Scrape {
    /// Reads a page of metrics.
    pub fn read(page: &str) -> Self {
        let mut scrape = Self::default();
        for line in page.lines().filter(|line| !line.starts_with('#')) {
            let mut reader = Reader(line);
            let name = reader.word().to_owned();
            let mut labels = BTreeMap::new();
            if reader.0.starts_with('{') {
                reader.until('{');
                labels = reader.matchers().into_iter().map(|(label, _, value)| (label, value)).collect();
            }
            let value = reader.0.trim();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            scrape.0.entry(name).or_default().push(labels);
        }
        scrape
    }

    /// How many series there are.
    pub fn series(&self) -> usize {
        self.0.values().map(Vec::len).sum()
    }

    /// Each series, as text.
    pub fn all(&self) -> BTreeSet<String> {
        self.0
            .iter()
            .flat_map(|(name, all)| all.iter().map(move |labels| format!("{name}{labels:?}")))
            .collect()
    }

    fn has_label(&self, label: &str) -> bool {
        self.0.values().flatten().any(|labels| labels.contains_key(label))
    }

    /// What an expression names that is not here.
    pub fn missing(&self, expression: &str, recorded: &BTreeSet<String>) -> Vec<String> {
        let named = read(expression);
        let mut missing = Vec::new();
        for label in named.grouping {
            if !ADDED.contains(&label.as_str()) && !self.has_label(&label) {
                missing.push(format!("label {label}"));
            }
        }
        for (name, matchers) in named.selectors {
            if name == "up" || recorded.contains(&name) {
                continue;
            }
            let Some(samples) = self.0.get(&name) else {
                missing.push(name);
                continue;
            };
            for (label, operator, value) in
                matchers.iter().filter(|(label, ..)| !ADDED.contains(&label.as_str()))
            {
                let values: BTreeSet<&str> =
                    samples.iter().filter_map(|labels| labels.get(label)).map(String::as_str).collect();
                let wanted = if operator == "=~" { value.split('|').collect() } else { vec![value.as_str()] };
                let is_there = |value: &&str| value.contains('$') || values.contains(value);
                if values.is_empty() {
                    missing.push(format!("{name}{{{label}}}"));
                } else if label == "le" && wanted.iter().any(is_there) {
                    // The forms of a scrape write bounds in different ways, so that a matcher may name both.
                } else if operator.starts_with('=') {
                    let absent = wanted.iter().filter(|value| !is_there(value));
                    missing.extend(absent.map(|value| format!("{name}{{{label}={value:?}}}")));
                }
            }
        }
        missing
    }
}

#[test]
fn an_expression_names_metrics_labels_and_values() {
    let expression = read(
        "1 - sum by (source, le) (rate(a_bucket{lane=\"live\",le=\"5.0\"}[5m])) / on (x) group_left b:c > 14.4 * 0.01 and up{job=\"a(b\"} == 0 or absent(d[$__rate_interval]) or $v",
    );
    let names: Vec<&str> = expression.selectors.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["a_bucket", "b:c", "up", "d"]);
    let matcher = |label: &str, value: &str| (label.to_owned(), "=".to_owned(), value.to_owned());
    assert_eq!(expression.selectors[0].1, [matcher("lane", "live"), matcher("le", "5.0")]);
    assert_eq!(expression.grouping, ["le", "source", "x"].map(str::to_owned).into());
}

#[test]
fn a_wrong_name_label_or_value_is_noticed() {
    let scrape = Scrape::read("# HELP a b\na_total{lane=\"live\",kind=\"held\"} 3\nb 1e-3\n");
    let recorded = ["r:a".to_owned()].into();
    let missing = |expression: &str| scrape.missing(expression, &recorded);
    for right in [
        "sum by (lane, instance) (rate(a_total{lane=\"live\",job=\"x\"}[5m])) > b",
        "a_total{kind=~\"held\",lane=~\"$lane\"} or r:a or up == 0",
        "label_values(a_total, lane)",
    ] {
        assert_eq!(missing(right), [""; 0], "{right}");
    }
    for (wrong, what) in [
        ("rate(a_totl[5m])", "a_totl"),
        ("sum by (lan) (b)", "label lan"),
        ("a_total{lain=\"live\"}", "a_total{lain}"),
        ("a_total{lane=\"lve\"}", "a_total{lane=\"lve\"}"),
        ("a_total{kind=~\"held|hold\"}", "a_total{kind=\"hold\"}"),
        ("label_values(a_total, lan)", "label lan"),
        ("r:b", "r:b"),
    ] {
        assert_eq!(missing(wrong), [what], "{wrong}");
    }
}
