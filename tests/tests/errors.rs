//! The catalogue of error codes is whole: what the sources answer is in it, what is in it is answered, and `docs/errors.md` is made
//! from it.
//!
//! After a wanted change: `BOREALIS_BLESS=1 cargo test -p borealis-tests --test errors`.

use std::{collections::BTreeSet, fmt::Write as _, path::Path};

use borealis_engine::error::catalogue::CODES;
use borealis_tests::{TestEngine, actor::statuses, engine::PASSWORD};
use serde_json::json;

/// Codes of errors that no client of the API sees: of the console, of settings, and of a start that fails.
const NOT_ANSWERED: &[&str] = &[
    "admin_not_found",
    "already_running",
    "api_refused",
    "api_unavailable",
    "audit_broken",
    "cannot_run",
    "data_folder_in_use",
    "data_folder_of_another_user",
    "database_unreachable",
    "database_unsuitable",
    "initdb_failed",
    "initdb_timeout",
    "interrupted",
    "invalid_database_url",
    "invalid_key",
    "invalid_key_file",
    "invalid_setting",
    "listen_failed",
    "migration_modified",
    "no_server_installed",
    "no_service_user",
    "not_an_admin",
    "nothing_typed",
    "postgres_does_not_answer",
    "postgres_does_not_start",
    "postgres_does_not_stop",
    "postgres_refuses",
    "rotation_busy",
    "rotation_not_prepared",
    "rotation_not_switched",
    "rotation_unfinished",
    "server_version_missing",
    "socket_path_too_long",
    "state_folder_unusable",
    "unknown_data_version",
    "unknown_workflow",
    "unseal_does_not_fit",
    "unseal_failed",
    "user_without_a_name",
    "webhook_failed",
    "worker_missing",
    "wrong_user",
];

#[test]
fn the_page_is_made_from_the_catalogue() {
    let mut page = String::from(
        "# Errors\n\nAn error is `{error, message, request_id}` with one of these codes in `error`, and `fields` where a field of the request is \
         at fault. The code and\nthe status are stable; the message is for people. This page is made from `engine/src/error/catalogue.rs`.\n\n\
         | code | status | says |\n|---|---|---|\n",
    );
    for code in &CODES {
        let statuses: Vec<String> = statuses(code).iter().map(u16::to_string).collect();
        let _ = writeln!(page, "| `{}` | {} | {} |", code.code, statuses.join(", "), code.says);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/errors.md");
    if std::env::var_os("BOREALIS_BLESS").is_some() {
        std::fs::write(&path, &page).expect("docs/errors.md can be written");
    }
    let committed = std::fs::read_to_string(&path).expect("docs/errors.md");
    assert!(committed == page, "docs/errors.md is not what the catalogue says; BOREALIS_BLESS=1 rewrites it");
}

#[test]
fn codes_are_in_order_and_say_something() {
    assert!(CODES.is_sorted_by(|one, other| one.code < other.code), "in order, each once");
    for code in &CODES {
        assert!(code.says.ends_with('.') && !code.kinds.is_empty() && !code.says.contains('|'), "{}", code.code);
    }
}

/// The codes that calls which make an error are given as text.
fn made(source: &str) -> BTreeSet<String> {
    let mut codes = BTreeSet::new();
    for (at, call) in ["Error::new(", "Error::conflict(", "Error::invalid(", "Error::field("]
        .into_iter()
        .flat_map(|call| source.match_indices(call))
        // Errors of the standard library have no codes.
        .filter(|(at, _)| !source[..*at].ends_with(':'))
        .map(|(at, call)| (at + call.len(), call))
    {
        let rest = &source[at..];
        let code = if call == "Error::new(" { rest.split_once(',').map(|(_, rest)| rest) } else { Some(rest) };
        let code = code.map(str::trim_start).and_then(|rest| rest.strip_prefix('"')).and_then(|rest| rest.split_once('"'));
        codes.extend(code.map(|(code, _)| code.to_owned()));
    }
    codes
}

/// The sources of the engine: path and text.
fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut folders: Vec<_> =
        ["engine", "api", "workflows", "workers", "agent/protocol"].map(|name| root.join(name).join("src")).into();
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push((path.display().to_string(), std::fs::read_to_string(&path).expect("a source")));
            }
        }
    }
    found
}

#[test]
fn sources_and_catalogue_have_the_same_codes() {
    let known: BTreeSet<&str> = CODES.iter().map(|code| code.code).chain(NOT_ANSWERED.iter().copied()).collect();
    let (mut unknown, mut texts) = (BTreeSet::new(), String::new());
    for (path, text) in sources() {
        if path.ends_with("error/catalogue.rs") || path.ends_with("tests.rs") {
            continue;
        }
        let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        unknown
            .extend(made(text).into_iter().filter(|code| !known.contains(code.as_str())).map(|code| format!("{path}: {code}")));
        texts.push_str(text);
    }
    assert!(unknown.is_empty(), "not in the catalogue: {unknown:#?}");
    let unused: Vec<_> = known.iter().filter(|code| !texts.contains(&format!("\"{code}\""))).collect();
    assert!(unused.is_empty(), "in the catalogue, and in no source: {unused:#?}");
}

#[test]
fn the_document_names_codes_of_the_catalogue() {
    let text =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json")).expect("docs/openapi.json");
    let document: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let mut wrong = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, operation) in item.as_object().expect("an item") {
            let Some(responses) = operation["responses"].as_object() else { continue };
            for (status, response) in responses.iter().filter(|(status, _)| status.starts_with(['4', '5'])) {
                let description = response["description"].as_str().unwrap_or_default();
                for named in description.split('`').skip(1).step_by(2) {
                    let Some(code) = CODES.iter().find(|code| code.code == named) else { continue };
                    if !statuses(code).contains(&status.parse().unwrap_or(0)) {
                        wrong.push(format!("{method} {path}: {status} {named}"));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "codes with a status that they do not come with: {wrong:#?}");
}

/// Codes that a rare mistake meets, and no other test does.
#[tokio::test]
async fn rare_mistakes_have_their_codes() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let admin = engine.admin().await;
    let nothing = uuid::Uuid::new_v4();
    let _ = admin.post(&format!("/api/runs/{nothing}/cancel"), json!({"reason": " "})).await.error(400, "invalid_reason");
    let _ = admin.get("/api/runs?state=asleep").await.error(400, "invalid_state");
    let names: Vec<String> = (0..1_001).map(|number| format!("host-{number}")).collect();
    let body = json!({"site_id": site, "hostnames": names});
    let _ = admin.post("/api/sites/assign", body).await.error(400, "too_many_hostnames");
    let body = json!({"username": "second", "password": "a long enough one"});
    let _ = engine.anonymous().post("/api/bootstrap/admin/setup", body).await.error(409, "invalid_phase");
    let _ = engine.anonymous().get("/socket.io/?EIO=4&transport=polling").await.error(400, "websocket_required");
    let body = json!({"current_password": PASSWORD, "new_password": "x".repeat(2_000)});
    let _ = admin.post("/api/auth/password/reset", body).await.error(400, "password_too_long");
}
