//! The OpenAPI document is complete, is what `docs/openapi.json` says, and lists the routes of the access table and no others.
//!
//! After a wanted change: `BOREALIS_BLESS=1 cargo test -p borealis-tests --test openapi`.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use borealis_api::access::Class;
use borealis_tests::TestEngine;
use serde_json::Value;

const METHODS: [&str; 5] = ["get", "post", "put", "patch", "delete"];

fn operations(document: &Value) -> impl Iterator<Item = (String, String, &Value)> {
    document["paths"].as_object().expect("paths").iter().flat_map(|(path, item)| {
        let item = item.as_object().expect("a path item");
        item.iter()
            .filter(|(method, _)| METHODS.contains(&method.as_str()))
            .map(move |(method, operation)| (method.to_uppercase(), path.clone(), operation))
    })
}

#[tokio::test]
async fn the_document_is_the_committed_one() {
    let engine = TestEngine::start().await;
    let served = engine.anonymous().get("/api/openapi.json").await.ok();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    if std::env::var_os("BOREALIS_BLESS").is_some() {
        let text = serde_json::to_string_pretty(&served).expect("JSON");
        std::fs::write(&path, text + "\n").expect("docs/openapi.json can be written");
    }
    let text = std::fs::read_to_string(&path).expect("docs/openapi.json");
    let committed: Value = serde_json::from_str(&text).expect("JSON in docs/openapi.json");
    let list = |document: &Value| operations(document).map(|(method, path, _)| (path, method)).collect::<BTreeSet<_>>();
    assert_eq!(list(&served), list(&committed), "routes differ from docs/openapi.json");
    assert!(served == committed, "docs/openapi.json is not what the engine serves; BOREALIS_BLESS=1 rewrites it");
}

#[tokio::test]
async fn the_document_and_the_access_table_list_the_same_routes() {
    let engine = TestEngine::start().await;
    let (_, document, table) = borealis_api::app::build(&engine.app);
    let document = serde_json::to_value(document).expect("JSON");
    let described: BTreeSet<_> = operations(&document).map(|(method, path, _)| (path, method)).collect();
    let listed: BTreeSet<_> = table.iter().map(|entry| (entry.path.clone(), entry.method.clone())).collect();
    assert_eq!(described, listed);
    assert_eq!(table.len(), listed.len(), "a route is in the access table twice");
}

#[tokio::test]
async fn every_operation_says_what_it_is() {
    let engine = TestEngine::start().await;
    let document = engine.anonymous().get("/api/openapi.json").await.ok();
    let mut ids = BTreeSet::new();
    for (method, path, operation) in operations(&document) {
        let place = format!("{method} {path}");
        let summary = operation["summary"].as_str().unwrap_or_default();
        assert!(!summary.is_empty() && summary.len() <= 160, "{place}: summary {summary:?}");
        assert!(operation["tags"][0].is_string(), "{place}: no tag");
        let id = operation["operationId"].as_str().unwrap_or_default();
        assert!(!id.is_empty() && ids.insert(id.to_owned()), "{place}: operation id {id:?} is missing or used twice");
        let responses = operation["responses"].as_object().expect("responses");
        // 410: a route that is only there to say what replaced it. Tunnels do not exist yet, which is all that route says.
        let refuses_only = responses.contains_key("410") || path == "/api/agent/vpn/ensure";
        let answers = responses.keys().any(|status| status.starts_with('2'));
        assert!(answers != refuses_only, "{place}: no success described");
        let parameters: BTreeSet<&str> = operation["parameters"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|parameter| parameter["in"] == "path")
            .filter_map(|parameter| parameter["name"].as_str())
            .collect();
        let named: BTreeSet<&str> = path.split('/').filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}')).collect();
        assert_eq!(parameters, named, "{place}: path parameters");
        assert!(operation["security"].is_array(), "{place}: says not who may call it");
    }
}

#[tokio::test]
async fn every_reference_in_the_document_resolves() {
    let engine = TestEngine::start().await;
    let document = engine.anonymous().get("/api/openapi.json").await.ok();
    let mut open = vec![&document];
    while let Some(value) = open.pop() {
        if let Some(reference) = value["$ref"].as_str() {
            let pointer = reference.trim_start_matches('#');
            assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
        }
        match value {
            Value::Array(items) => open.extend(items),
            Value::Object(members) => open.extend(members.values()),
            _ => {}
        }
    }
}

#[tokio::test]
async fn every_response_is_described_and_every_refusal_before_a_handler_is_listed() {
    let engine = TestEngine::start().await;
    let document = engine.anonymous().get("/api/openapi.json").await.ok();
    let (_, _, table) = borealis_api::app::build(&engine.app);
    for (method, path, operation) in operations(&document) {
        let place = format!("{method} {path}");
        let responses = operation["responses"].as_object().expect("responses");
        for (status, response) in responses {
            assert!(response["description"].as_str().is_some_and(|text| !text.is_empty()), "{place} {status}: no description");
            if status.starts_with(['4', '5']) {
                let schema = response["content"]["application/json"]["schema"]["$ref"].as_str();
                // The test of a provider answers what it found out in each case.
                let expected = schema.is_some_and(|schema| schema.ends_with("/Error") || path.ends_with("/test"));
                assert!(expected, "{place} {status}: {schema:?}");
            }
        }
        let class = table.iter().find(|entry| entry.method == method && entry.path == path).expect("an entry").class;
        let operators = matches!(class, Class::Operator | Class::Admin);
        let has_body = operation["requestBody"].is_object();
        for (is_so, status) in [
            (class != Class::Anonymous, "401"),
            (operators, "403"),
            (has_body, "400"),
            (has_body, "413"),
            (has_body, "415"),
            (true, "503"),
        ] {
            assert!(!is_so || responses.contains_key(status), "{place}: no {status}");
        }
    }
}

/// Schemas of one name would take each other's place in the document, without a word.
#[test]
fn no_two_schemas_have_one_name() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut names: BTreeMap<String, String> = BTreeMap::new();
    for folder in ["api/src", "engine/src", "workflows/src", "agent/protocol/src"] {
        let mut open = vec![root.join(folder)];
        while let Some(path) = open.pop() {
            if path.is_dir() {
                open.extend(std::fs::read_dir(&path).expect("a folder").map(|entry| entry.expect("an entry").path()));
                continue;
            }
            if path.extension().is_none_or(|extension| extension != "rs") {
                continue;
            }
            let text = std::fs::read_to_string(&path).expect("a source");
            let mut lines = text.lines();
            while let Some(line) = lines.next() {
                if !(line.contains("derive(") && line.contains("ToSchema")) {
                    continue;
                }
                let (mut renamed, mut declared) = (None, None);
                for line in lines.by_ref() {
                    if let Some((_, rest)) = line.split_once("schema(as = ") {
                        renamed = rest.split(|c: char| !c.is_alphanumeric()).next().map(str::to_owned);
                    }
                    let words: Vec<&str> = line.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
                    if !line.trim_start().starts_with(['#', '/'])
                        && let Some(at) = words.iter().position(|word| matches!(*word, "struct" | "enum"))
                    {
                        declared = words.get(at + 1).map(|name| (*name).to_owned());
                        break;
                    }
                }
                let name = renamed.or(declared).unwrap_or_else(|| panic!("{}: a schema without a name", path.display()));
                let place = path.display().to_string();
                if let Some(other) = names.insert(name.clone(), place.clone()) {
                    panic!("two schemas are called {name}: in {other} and in {place}");
                }
            }
        }
    }
    assert!(names.len() > 100, "{}", names.len());
}
