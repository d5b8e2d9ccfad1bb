//! Metadata filters, as documented by Pinecone.

use std::cmp::Ordering;

use serde_json::{Map, Value};

use super::asked::LimitResult;

/// Whether the metadata matches a filter.
pub(super) fn matches(filter: &Value, metadata: &Map<String, Value>) -> LimitResult<bool> {
    let Value::Object(conditions) = filter else { return Err("a filter must be an object".into()) };
    for (key, condition) in conditions {
        let passes = match key.as_str() {
            "$and" | "$or" => {
                let parts = condition.as_array().ok_or_else(|| format!("{key} takes a list"))?;
                let mut results = Vec::new();
                for part in parts {
                    results.push(matches(part, metadata)?);
                }
                if key == "$and" { results.iter().all(|it| *it) } else { results.iter().any(|it| *it) }
            }
            field => matches_condition(metadata.get(field), condition)?,
        };
        if !passes {
            return Ok(false);
        }
    }
    Ok(true)
}

fn matches_condition(value: Option<&Value>, condition: &Value) -> LimitResult<bool> {
    let Value::Object(operators) = condition else { return Ok(value_matches(value, condition)) };
    for (operator, operand) in operators {
        let among = || operand.as_array().map(|list| list.iter().any(|one| value_matches(value, one)));
        let ordered = |expected: &[Ordering]| {
            let number = |value: Option<&Value>| value.and_then(Value::as_f64);
            let order = number(value).zip(number(Some(operand))).and_then(|(a, b)| a.partial_cmp(&b));
            order.is_some_and(|order| expected.contains(&order))
        };
        let passes = match operator.as_str() {
            "$eq" => value_matches(value, operand),
            "$ne" => !value_matches(value, operand),
            "$gt" => ordered(&[Ordering::Greater]),
            "$gte" => ordered(&[Ordering::Greater, Ordering::Equal]),
            "$lt" => ordered(&[Ordering::Less]),
            "$lte" => ordered(&[Ordering::Less, Ordering::Equal]),
            "$in" => among().ok_or("$in takes a list")?,
            "$nin" => !among().ok_or("$nin takes a list")?,
            "$exists" => value.is_some() == operand.as_bool().unwrap_or(true),
            other => return Err(format!("{other} is not a valid operator")),
        };
        if !passes {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a value equals the expected one, or a list contains it.
fn value_matches(value: Option<&Value>, expected: &Value) -> bool {
    match value {
        Some(Value::Array(items)) => items.contains(expected),
        Some(Value::Number(number)) => {
            expected.as_f64().is_some_and(|expected| number.as_f64() == Some(expected))
        }
        Some(value) => value == expected,
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn operators_mean_what_they_say() {
        let metadata = json!({ "n": 3, "s": "a", "l": ["x", "y"], "b": true });
        let metadata = metadata.as_object().unwrap();
        let passes = |filter: Value| matches(&filter, metadata).unwrap();
        for yes in [
            json!({}),
            json!({ "n": 3 }),
            json!({ "n": { "$gte": 3, "$lt": 4 } }),
            json!({ "l": "x" }),
            json!({ "s": { "$in": ["a", "b"] } }),
            json!({ "s": { "$ne": "b" }, "b": true }),
            json!({ "none": { "$exists": false } }),
            json!({ "$or": [{ "n": 4 }, { "$and": [{ "s": "a" }, { "b": true }] }] }),
        ] {
            assert!(passes(yes.clone()), "{yes}");
        }
        for no in [
            json!({ "n": 4 }),
            json!({ "s": { "$nin": ["a"] } }),
            json!({ "none": 1 }),
            json!({ "s": { "$gt": 1 } }),
        ] {
            assert!(!passes(no.clone()), "{no}");
        }
        assert!(matches(&json!({ "n": { "$like": 1 } }), metadata).is_err());
    }
}
