//! Errors of embedding servers, and how the embedder handles them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, SystemTime};

use refarch::pipeline::embedder::Embedder;
use refarch::pipeline::failure::{Class, Error, FailureKind};
use serde_json::json;

use super::stub::{ScriptedServer, status, vectors, with_header};
use super::{KEY, open, settings, texts, variables};
use crate::common::{self, Database};

const TIMEOUT: Duration = Duration::from_mins(1);

/// With the dimensions set, so that no request is needed to find them.
const SET: (&str, &str) = ("REFARCH_EMBEDDER_DIMENSIONS", "4");

/// Tokens of a text, as a model without many words of other scripts counts them.
fn crude_tokens(text: &str) -> usize {
    let other = text.chars().filter(|one| !one.is_ascii()).count();
    (text.len() - text.chars().filter(|one| !one.is_ascii()).map(char::len_utf8).sum::<usize>()) / 4
        + 2 * other
}

/// A server that refuses a request in which a text has too many tokens, as `OpenAI` does.
async fn strict(most: usize) -> ScriptedServer {
    ScriptedServer::start(move |asked, _| {
        let worst = asked.texts.iter().map(|text| crude_tokens(text)).max().unwrap_or_default();
        if worst > most {
            let message =
                format!("maximum context length is {most} tokens, however you requested {worst} tokens");
            return status(400, &json!({ "error": { "message": message } }).to_string());
        }
        vectors(asked)
    })
    .await
}

async fn one(embedder: &dyn Embedder) -> Result<(), Error> {
    embedder.embed_texts(&texts(&["a"])).await.map(|_| ())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_fails_once_is_retried_whatever_the_status() {
    let statuses = [
        301, 302, 303, 307, 308, 402, 408, 409, 418, 421, 423, 424, 425, 429, 499, 500, 501, 502, 503, 504,
        507, 520, 529,
    ];
    for kind in ["openai", "tei"] {
        let server = ScriptedServer::start(move |asked, number| {
            let at = number.checked_sub(1).filter(|at| at % 2 == 0).map(|at| at / 2);
            match at.filter(|_| !asked.is_get).and_then(|at| statuses.get(at)) {
                Some(code) => status(*code, "not now"),
                None => vectors(asked),
            }
        })
        .await;
        let set = if kind == "tei" { vec![("REFARCH_EMBEDDER_MODEL", "stub")] } else { vec![] };
        let embedder = open(kind, &server.url, &set).await.unwrap();
        for code in statuses {
            let done = one(&*embedder).await;
            assert!(done.is_ok(), "{kind}, {code}: {done:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_retried_if_the_answer_holds_no_vectors() {
    let wrong =
        ["<html><title>Sign in</title></html>", r#"{"data":[{"index":0,"embedding":[1.0,"#, "", "[]", "null"];
    let server = ScriptedServer::start(move |asked, number| match wrong.get(number.wrapping_sub(1) / 2) {
        Some(body) if number % 2 == 1 => status(200, body),
        _ => vectors(asked),
    })
    .await;
    let embedder = open("openai", &server.url, &[]).await.unwrap();
    for body in wrong {
        let done = one(&*embedder).await;
        assert!(done.is_ok(), "{body}: {done:?}");
    }
    let server = ScriptedServer::start(
        |asked, number| if number == 0 { vectors(asked) } else { status(200, "<html>") },
    )
    .await;
    let embedder = open("openai", &server.url, &[]).await.unwrap();
    let error = one(&*embedder).await.unwrap_err();
    assert!(error.class() == Class::Retryable && error.message().contains("/v1/embeddings"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redirect_is_reported_and_the_key_does_not_follow_it() {
    let other = ScriptedServer::start(|asked, _| vectors(asked)).await;
    let to = format!("{}/elsewhere/embeddings?token=hidden", other.url);
    let server = ScriptedServer::start(move |_, _| with_header(307, "Location", &to)).await;
    let embedder = open("openai", &server.url, &[SET]).await.unwrap();
    let error = one(&*embedder).await.unwrap_err();
    assert_eq!(error.class(), Class::Retryable, "{error}");
    let place = format!("{}/elsewhere/embeddings", other.url);
    assert!(error.message().contains(&place) && error.message().contains("embedder.url"), "{error}");
    assert!(!error.message().contains("hidden") && other.asked().is_empty(), "{error}");
    assert!(server.asked().iter().all(|one| one.key == format!("Bearer {KEY}")));
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_wait_for_as_long_as_the_server_asks() {
    let then = SystemTime::now() + Duration::from_secs(125);
    let date = jiff::Timestamp::try_from(then).unwrap().strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
    for (value, least, most) in [
        ("120", 120, 120),
        (" 90 ", 90, 90),
        (date.as_str(), 60, 126),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
    ] {
        let value = value.to_owned();
        let server = ScriptedServer::start(move |asked, number| match number {
            0 => vectors(asked),
            _ => with_header(503, "Retry-After", &value),
        })
        .await;
        let embedder = open("openai", &server.url, &[]).await.unwrap();
        let error = one(&*embedder).await.unwrap_err();
        let asked = error.retry_after().map(|pause| pause.as_secs());
        assert!(asked.is_some_and(|pause| (least..=most).contains(&pause)), "{error}: {asked:?}");
        // A pause that is longer than a request's own tries last is left to the caller: nothing is sent meanwhile.
        if least > 0 {
            let again = one(&*embedder).await.unwrap_err();
            assert_eq!(again.kind(), FailureKind::RateLimited, "{again}");
            assert!(futures::poll!(embedder.ready()).is_pending());
            assert_eq!(server.asked().len(), 2);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_that_is_too_long_for_the_server_is_cut_until_it_fits() {
    let server = strict(8_191).await;
    let embedder = open("openai", &server.url, &[]).await.unwrap();
    let emoji = "\u{1f600}".repeat(7_000);
    let thai = "\u{e01}".repeat(9_000);
    let base64 = "QUJD".repeat(20_000);
    let given = texts(&["first", &emoji, "second", &thai, &base64, "third", "\u{1f600}"]);
    let made = embedder.embed_texts(&given).await.unwrap();
    assert_eq!(made.len(), given.len());
    for (text, vector) in given.iter().zip(&made) {
        let wanted =
            embedder.embed_texts(&texts(&[&text.chars().take(2).collect::<String>()])).await.unwrap();
        assert_eq!(vector, &wanted[0], "in the order of the texts");
    }
    assert!(embedder.embed_query(&Arc::from(emoji.as_str())).await.is_ok(), "a question too");
    for asked in server.asked() {
        assert!(asked.texts.iter().all(|text| !text.is_empty() && !text.contains('\u{fffd}')));
    }
    // A small model behind the same protocol: what is sent at first is sixteen times too long.
    let server = strict(512).await;
    let embedder = open("openai", &server.url, &[]).await.unwrap();
    assert_eq!(embedder.embed_texts(&given).await.unwrap().len(), given.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_refused_text_costs_few_requests_and_a_server_that_refuses_all_costs_fewer() {
    let long = |n: usize| -> Arc<str> { format!("{n} {}", "and so on, ".repeat(100)).into() };
    let many: Vec<Arc<str>> = (0..64).map(long).collect();
    let server =
        ScriptedServer::start(|asked, number| if number == 0 { vectors(asked) } else { status(400, "no") })
            .await;
    let embedder = open("openai", &server.url, &[]).await.unwrap();
    let error = embedder.embed_texts(&many).await.unwrap_err();
    assert_eq!(error.class(), Class::Permanent, "{error}");
    assert!(server.asked().len() <= 4, "{}", server.asked().len());
    let server = ScriptedServer::start(|asked, _| {
        let is_refused = asked.texts.iter().any(|text| text.starts_with("7 "));
        if is_refused { status(422, "no") } else { vectors(asked) }
    })
    .await;
    let embedder = open("openai", &server.url, &[]).await.unwrap();
    let error = embedder.embed_texts(&many).await.unwrap_err();
    assert_eq!(error.class(), Class::Permanent, "{error}");
    assert!(server.asked().len() <= 32, "{}", server.asked().len());
}

#[tokio::test(flavor = "multi_thread")]
async fn long_rows_are_cut_and_indexed_with_one_warning() {
    let server = strict(8_191).await;
    let database = Database::create().await;
    let run = async |args: &[&str]| {
        let mut command = database.refarch();
        let output = command.args(args).envs(variables("openai", &server.url)).output().await.unwrap();
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{said}");
        said
    };
    run(&["migrate"]).await;
    let client = database.client().await;
    client
        .batch_execute(
            "INSERT INTO products_with_increment (id, description) SELECT n, repeat('😀', 7000 + n) FROM generate_series(1, 4) n; \
             INSERT INTO products_with_increment (id, description) SELECT 10 + n, repeat('ก', 9000 + n) FROM generate_series(1, 4) n; \
             INSERT INTO products_with_increment (id, description) SELECT 20 + n, 'a short one ' || n FROM generate_series(1, 4) n",
        )
        .await
        .unwrap();
    run(&["listen", "--until-idle"]).await;
    let said = run(&["embed", "--until-idle"]).await;
    assert_eq!(said.matches("is cut").count(), 1, "{said}");
    run(&["verify", "--sample", "12"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_path_and_query_of_the_address_are_kept() {
    let server = ScriptedServer::start(|asked, _| vectors(asked)).await;
    for (kind, given, wanted) in [
        ("openai", "", "/v1/embeddings"),
        ("openai", "/", "/v1/embeddings"),
        ("openai", "/v1", "/v1/embeddings"),
        ("openai", "/v1/", "/v1/embeddings"),
        ("openai", "/api/v1", "/api/v1/embeddings"),
        ("openai", "/v1/embeddings", "/v1/embeddings"),
        (
            "openai",
            "/openai/deployments/small?api-version=2024-10-21",
            "/openai/deployments/small/embeddings?api-version=2024-10-21",
        ),
        ("openai", "?api-version=x&a=b", "/v1/embeddings?api-version=x&a=b"),
        ("tei", "", "/embed"),
        ("tei", "/models/one/", "/models/one/embed"),
        ("tei", "/models/one?key=1", "/models/one/embed?key=1"),
        ("pinecone", "/proxy", "/proxy/embed"),
    ] {
        let before = server.asked().len();
        let opened = open(kind, &format!("{}{given}", server.url), &[SET]).await;
        // The stub does not speak Pinecone's protocol; where it was asked is what counts.
        if let Ok(embedder) = opened {
            let _ = one(&*embedder).await;
        }
        let asked = &server.asked()[before..];
        let targets: Vec<&str> =
            asked.iter().filter(|one| !one.is_get).map(|one| one.target.as_str()).collect();
        assert!(
            !targets.is_empty() && targets.iter().all(|target| *target == wanted),
            "{kind} {given}: {targets:?}"
        );
        let info = wanted.replace("/embed", "/info");
        let targets: Vec<&str> =
            asked.iter().filter(|one| one.is_get).map(|one| one.target.as_str()).collect();
        assert!(kind != "tei" || targets.iter().all(|target| *target == info), "{kind} {given}: {targets:?}");
    }
}

#[test]
fn an_unusable_address_is_refused_by_its_setting_and_not_shown() {
    for (url, wanted) in [
        ("http://me:hidden@host/v1", "user"),
        ("http://hidden@host/v1", "user"),
        ("http://host/v1#hidden", "#"),
        ("ftp://host/hidden", "http"),
        ("host:8080", "http"),
        ("http://", "address"),
        ("http://ho st/hidden", "address"),
    ] {
        let load = || {
            let env =
                variables("openai", url).into_iter().map(|(key, value)| (key.to_owned(), value.to_owned()));
            refarch::config::Settings::load(None, &env.collect(), &[])
        };
        let error = load().err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("embedder.url") && error.contains(wanted), "{url}: {error}");
        assert!(!error.contains("hidden"), "{url}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_is_reported_at_the_start_even_if_the_dimensions_are_set() {
    let server =
        ScriptedServer::start(
            |asked, _| if asked.is_get { vectors(asked) } else { status(401, "no such key") },
        )
        .await;
    for kind in ["openai", "tei", "pinecone"] {
        let error = open(kind, &server.url, &[SET]).await.err();
        let error = error.unwrap_or_else(|| panic!("{kind}: the wrong key went unnoticed"));
        assert!(
            error.class() == Class::Fatal && error.message().contains("embedder.api_key"),
            "{kind}: {error}"
        );
    }
    let asked = server.asked().len();
    let set = settings(&[variables("openai", &server.url), vec![SET]].concat());
    assert!(refarch::backend::index_shape(&set).await.is_ok(), "roles that embed nothing need no key");
    assert_eq!(server.asked().len(), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_start_waits_for_a_server_that_is_not_up_yet() {
    let nowhere = format!("http://127.0.0.1:{}", common::free_port());
    let embedder = open("openai", &nowhere, &[SET]).await.unwrap();
    assert_eq!(one(&*embedder).await.unwrap_err().class(), Class::Retryable);
    let busy = ScriptedServer::start(|_, _| status(503, "loading the model")).await;
    let embedder = open("openai", &busy.url, &[SET]).await.unwrap();
    assert_eq!(one(&*embedder).await.unwrap_err().class(), Class::Retryable);
    // What it would be named by is not known yet: another name would be another model.
    let unnamed = [SET, ("REFARCH_EMBEDDER_MODEL", "")];
    let error = open("tei", &busy.url, &unnamed).await.err().expect("the name is asked for");
    assert_eq!(error.class(), Class::Retryable, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_every_request_is_fatal_and_names_the_address_and_no_secret() {
    for code in [401, 403, 404, 405, 410, 415] {
        let said = format!("wrong: {KEY}");
        let server = ScriptedServer::start(
            move |asked, number| if number == 0 { vectors(asked) } else { status(code, &said) },
        )
        .await;
        let url = format!("{}/api/v1?code=hidden", server.url);
        let embedder = open("openai", &url, &[]).await.unwrap();
        let error = one(&*embedder).await.unwrap_err();
        assert_eq!(error.class(), Class::Fatal, "{error}");
        let place = format!("{}/api/v1/embeddings", server.url);
        assert!(error.message().contains(&place) && error.message().contains("embedder."), "{error}");
        assert!(!error.to_string().contains("hidden") && !error.to_string().contains(KEY), "{error}");
    }
    let nowhere = format!("http://127.0.0.1:{}/v1?code=hidden", common::free_port());
    let error = open("openai", &nowhere, &[]).await.err().unwrap();
    assert!(error.message().contains("/v1/embeddings") && !error.message().contains("hidden"), "{error}");
}

/// The state of the server in the next test.
const WELL: u8 = 0;
const AWAY: u8 = 1;
const OF_ANOTHER_MODEL: u8 = 2;

#[tokio::test(flavor = "multi_thread")]
async fn while_the_server_is_down_only_embedding_stops() {
    // Nobody sets the length of the vectors, and in the second case not even the model's name.
    for (kind, name) in [("openai", "all-minilm"), ("tei", "")] {
        let mood = Arc::new(AtomicU8::new(WELL));
        let seen = Arc::clone(&mood);
        let server = ScriptedServer::start(move |asked, _| match seen.load(Ordering::SeqCst) {
            AWAY => status(503, "not now"),
            OF_ANOTHER_MODEL if asked.is_get => status(200, r#"{"model_id": "another"}"#),
            _ => vectors(asked),
        })
        .await;
        let database = Database::create().await;
        let nowhere = format!("http://127.0.0.1:{}", common::free_port());
        let command = |args: &[&str], url: &str| {
            let mut command = database.refarch();
            command.args(args).envs(variables(kind, url)).env("REFARCH_EMBEDDER_MODEL", name);
            command.env("REFARCH_DATABASE_CONNECT_TIMEOUT_S", "2");
            command
        };
        let run = async |args: &[&str], url: &str| {
            let output = command(args, url).output().await.unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned()
                + &String::from_utf8_lossy(&output.stderr);
            println!("{kind} {args:?}: {said}");
            (output.status.code().unwrap(), said)
        };
        // Roles that embed nothing say what is missing, and do not ask the server.
        let told = async |wanted: &str, args: &[&str], model: &str| {
            let output = command(args, &nowhere).env("REFARCH_EMBEDDER_MODEL", model).output().await.unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(said.contains(wanted) && said.contains("run refarch migrate"), "{args:?}: {said}");
        };
        let parts: [&[&str]; 4] = [&["status"], &["listen"], &["redrive"], &["verify", "--sample", "0"]];
        for args in parts {
            told("no schema refarch", args, name).await;
        }
        assert_eq!(run(&["migrate"], &server.url).await.0, 0);
        let client = database.client().await;
        let insert = "INSERT INTO products_with_increment (description) VALUES ('a'), ('b')";
        client.batch_execute(insert).await.unwrap();
        assert_eq!(run(&["listen", "--until-idle"], &server.url).await.0, 0);
        assert_eq!(run(&["embed", "--until-idle"], &server.url).await.0, 0);

        assert_eq!(run(&["status"], &nowhere).await.0, 0);
        let (code, said) = run(&["verify", "--sample", "0"], &nowhere).await;
        assert!(code == 0 && said.contains("index and table agree"), "{said}");
        let (code, said) = run(&["verify"], &nowhere).await;
        assert!(code == 2 && said.contains("2 of them: ") && said.contains("all else agrees"), "{said}");
        assert_eq!(run(&["redrive", "--all"], &nowhere).await.0, 0);
        client.batch_execute(insert).await.unwrap();
        assert_eq!(run(&["listen", "--until-idle"], &nowhere).await.0, 0);
        let bind = format!("127.0.0.1:{}", common::free_port());
        let mut serve = command(&["serve", "--bind", &bind], &nowhere).spawn().unwrap();
        common::eventually("the page to be served", TIMEOUT, async || {
            let page = reqwest::get(format!("http://{bind}/")).await;
            page.is_ok_and(|page| page.status().is_success())
        })
        .await;
        serve.kill().await.unwrap();

        let fault = async |part: &str| {
            let like = format!("%{part}%");
            let sql = "SELECT EXISTS (SELECT FROM refarch.fault WHERE kind = 'held' AND message LIKE $1)";
            client.query_one(sql, &[&like]).await.unwrap().get::<_, bool>(0)
        };
        mood.store(AWAY, Ordering::SeqCst);
        let mut embed = command(&["embed"], &server.url).spawn().unwrap();
        common::eventually("the fault to be told", TIMEOUT, async || fault("503").await).await;
        if name.is_empty() {
            mood.store(OF_ANOTHER_MODEL, Ordering::SeqCst);
            common::eventually("the other model to be told", TIMEOUT, async || fault("another").await).await;
        }
        mood.store(WELL, Ordering::SeqCst);
        common::eventually("all to be in sync", TIMEOUT, async || {
            run(&["status"], &nowhere).await.1.contains("in sync        4,")
        })
        .await;
        embed.kill().await.unwrap();
        let (code, said) = run(&["verify"], &server.url).await;
        assert!(code == 0 && said.contains("4 compared, 0 otherwise"), "{said}");
        // Another model than the index's is still refused.
        for args in parts {
            told("the index was made with model", args, "other").await;
        }
    }
}
