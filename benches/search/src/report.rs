//! The figures as tables, and as JSON.

use serde_json::Value;

/// A table with a title. `columns` are keys of the rows; a key that no row has is left out.
pub fn print(title: &str, columns: &[&str], rows: &[Value]) {
    if rows.is_empty() {
        return;
    }
    println!("\n{title}");
    for line in lines(columns, rows) {
        println!("{line}");
    }
}

fn lines(columns: &[&str], rows: &[Value]) -> Vec<String> {
    let present = columns.iter().filter(|column| rows.iter().any(|row| !row[**column].is_null()));
    let columns: Vec<Vec<String>> = present
        .map(|column| {
            std::iter::once((*column).to_owned()).chain(rows.iter().map(|row| cell(&row[*column]))).collect()
        })
        .collect();
    let width = |column: &[String]| column.iter().map(|cell| cell.chars().count()).max().unwrap_or_default();
    let line = |number: usize| {
        let cells = columns.iter().map(|column| format!("{:<1$}", column[number], width(column)));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    (0..=rows.len()).map(line).collect()
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.into(),
        Value::Number(number) if number.is_f64() => {
            let number = number.as_f64().unwrap_or_default();
            let decimals = if number < 1.0 {
                4
            } else if number < 100.0 {
                2
            } else {
                0
            };
            format!("{number:.decimals$}")
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_are_aligned_and_empty_ones_left_out() {
        let rows = [json!({ "mode": "exact", "p50_ms": 1234.5 }), json!({ "mode": "lists", "p50_ms": null })];
        assert_eq!(lines(&["mode", "p50_ms", "lists"], &rows), ["mode   p50_ms", "exact  1234", "lists  -"]);
        assert_eq!(
            [json!(0.98765), json!(12.345), json!(7), json!(true)].map(|v| cell(&v)),
            ["0.9877", "12.35", "7", "yes"]
        );
    }
}
