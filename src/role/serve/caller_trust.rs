//! Trust in a request's client.
//!
//! A client on this machine, or with the token, sees everything. A stranger sees what a page needs: no host
//! names, no processes, and no error texts of a backend.

use serde_json::Value;

tokio::task_local! {
    static TRUSTED: bool;
}

/// Keys of a status that strangers do not see, at any depth.
const PRIVATE: [&str; 4] = ["worker_id", "host", "pid", "message"];

/// A key whose texts name tables. Strangers see only whether there are any.
const DETAILED: &str = "capture_faults";

/// What strangers see instead of [`DETAILED`].
const SOME: &str = "some changes";

/// Runs the work of a request whose client is trusted, or is not.
pub async fn with_trust<T>(trusted: bool, work: impl Future<Output = T>) -> T {
    TRUSTED.scope(trusted, work).await
}

/// Whether the current request's client may see everything.
pub fn is_trusted() -> bool {
    TRUSTED.try_with(|trusted| *trusted).unwrap_or(false)
}

/// The status as the current request's client may see it.
pub fn redacted(mut status: Value) -> Value {
    if !is_trusted() {
        strip(&mut status);
    }
    status
}

fn strip(value: &mut Value) {
    match value {
        Value::Object(keys) => {
            keys.retain(|key, _| !PRIVATE.contains(&key.as_str()));
            if let Some(Value::Array(details)) = keys.get_mut(DETAILED)
                && !details.is_empty()
            {
                *details = vec![SOME.into()];
            }
            keys.values_mut().for_each(strip);
        }
        Value::Array(values) => values.iter_mut().for_each(strip),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn an_untrusted_caller_sees_an_error_without_its_location() {
        let status = || {
            json!({
                "workers": [{ "worker_id": "embed-7", "host": "vm", "pid": 7, "role": "embed" }],
                "faults": [{ "kind": "embedder", "message": "10.0.0.7 refuses" }],
                "capture_faults": ["public.a: no trigger", "public.b: no trigger"],
            })
        };
        let seen = with_trust(false, async { redacted(status()) }).await;
        let wanted = json!({
            "workers": [{ "role": "embed" }], "faults": [{ "kind": "embedder" }], "capture_faults": ["some changes"],
        });
        assert_eq!(seen, wanted);
        assert_eq!(with_trust(true, async { redacted(status()) }).await, status());
    }
}
