//! Who a request is answered to.
//!
//! Somebody at this machine, or with the token, is told everything. A stranger is told what a page needs:
//! no names of hosts, no processes, and no words of a back end.

use serde_json::Value;

tokio::task_local! {
    static TRUSTED: bool;
}

/// Keys of a status that are no stranger's business, at any depth.
const PRIVATE: [&str; 4] = ["worker_id", "host", "pid", "message"];

/// A key whose texts name tables: strangers see that there are some.
const DETAILED: &str = "capture_faults";

/// What strangers see of [`DETAILED`].
const SOME: &str = "some changes";

/// Answers a request to somebody who is trusted, or is not.
pub async fn answer_to<T>(trusted: bool, work: impl Future<Output = T>) -> T {
    TRUSTED.scope(trusted, work).await
}

/// Whether the request at hand is answered to somebody who may see everything.
pub fn is_trusted() -> bool {
    TRUSTED.try_with(|trusted| *trusted).unwrap_or(false)
}

/// A status as this request's client may see it.
pub fn shown(mut status: Value) -> Value {
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
    async fn a_stranger_sees_that_something_is_wrong_and_not_where() {
        let status = || {
            json!({
                "workers": [{ "worker_id": "embed-7", "host": "vm", "pid": 7, "role": "embed" }],
                "faults": [{ "kind": "embedder", "message": "10.0.0.7 refuses" }],
                "capture_faults": ["public.a: no trigger", "public.b: no trigger"],
            })
        };
        let seen = answer_to(false, async { shown(status()) }).await;
        let wanted = json!({
            "workers": [{ "role": "embed" }], "faults": [{ "kind": "embedder" }], "capture_faults": ["some changes"],
        });
        assert_eq!(seen, wanted);
        assert_eq!(answer_to(true, async { shown(status()) }).await, status());
    }
}
