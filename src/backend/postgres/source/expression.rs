//! SQL expressions for a row's text and metadata.

use super::quote::quote_ident;

/// Columns in one call: PostgreSQL allows 100 arguments, and a metadata column needs two.
const COLUMNS_A_CALL: usize = 50;

/// One column as it is; several columns joined by line breaks, without nulls.
pub(super) fn text(columns: &[String]) -> String {
    let quoted: Vec<String> = columns.iter().map(|name| format!("s.{}::text", quote_ident(name))).collect();
    match quoted.as_slice() {
        [one] => format!("coalesce({one}, '')"),
        some if some.len() <= COLUMNS_A_CALL => format!("concat_ws(E'\\n', {})", some.join(", ")),
        many => format!("concat_ws(E'\\n', VARIADIC ARRAY[{}])", many.join(", ")),
    }
}

/// A JSON object of the columns, without nulls.
pub(super) fn metadata(columns: &[String]) -> String {
    let pair = |name: &String| format!("'{}', s.{}", name.replace('\'', "''"), quote_ident(name));
    let mut objects: Vec<String> = columns
        .chunks(COLUMNS_A_CALL)
        .map(|some| format!("jsonb_build_object({})", some.iter().map(pair).collect::<Vec<_>>().join(", ")))
        .collect();
    if objects.is_empty() {
        objects.push("jsonb_build_object()".into());
    }
    format!("jsonb_strip_nulls({})", objects.join(" || "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted_as_text_and_as_identifiers() {
        assert_eq!(metadata(&["it's".into()]), "jsonb_strip_nulls(jsonb_build_object('it''s', s.\"it's\"))");
        assert_eq!(metadata(&[]), "jsonb_strip_nulls(jsonb_build_object())");
        assert_eq!(text(&["a\"".into()]), "coalesce(s.\"a\"\"\"::text, '')");
    }

    #[test]
    fn no_call_has_more_arguments_than_postgresql_takes() {
        let columns: Vec<String> = (0..120).map(|n| format!("c{n}")).collect();
        let metadata = metadata(&columns);
        let most = metadata.split("jsonb_build_object").map(|call| call.matches(", s.").count()).max();
        assert_eq!((most, metadata.matches("jsonb_build_object").count()), (Some(50), 3));
        assert!(text(&columns).contains("VARIADIC ARRAY[s.\"c0\"::text, "));
    }
}
