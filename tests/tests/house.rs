//! The house keeps its plan: which crate may know which, and where SQL and HTTP are allowed.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;
use sha2::{Digest, Sha256};

/// Every crate of the workspace and the ones of it that it may depend on.
const ARROWS: [(&str, &[&str]); 10] = [
    ("borealis-protocol", &[]),
    ("borealis-engine", &["borealis-protocol"]),
    ("borealis-tasks", &[]),
    ("borealis-durable", &["borealis-tasks"]),
    ("borealis-telemetry", &[]),
    ("borealis-workflows", &["borealis-durable", "borealis-engine", "borealis-protocol", "borealis-tasks", "borealis-telemetry"]),
    ("borealis-api", &["borealis-engine", "borealis-protocol", "borealis-tasks", "borealis-telemetry", "borealis-workflows"]),
    ("borealis-workers", &["borealis-engine", "borealis-protocol", "borealis-tasks", "borealis-telemetry", "borealis-workflows"]),
    ("borealis-agent", &["borealis-protocol"]),
    (
        "borealis-tests",
        &[
            "borealis-agent",
            "borealis-api",
            "borealis-engine",
            "borealis-protocol",
            "borealis-tasks",
            "borealis-telemetry",
            "borealis-workers",
            "borealis-workflows",
        ],
    ),
];

/// What must not be in a crate's binary, by the beginnings of package names.
const ABSENT: [(&str, &[&str]); 7] = [
    ("borealis-protocol", &["axum", "hyper", "sqlx", "apalis", "socketioxide", "tokio"]),
    ("borealis-telemetry", &["axum", "sqlx", "apalis", "socketioxide", "tonic", "openssl-sys", "native-tls", "aws-lc"]),
    ("borealis-engine", &["prometheus", "opentelemetry", "axum", "apalis", "socketioxide", "engineioxide"]),
    ("borealis-durable", &["axum", "hyper", "opentelemetry", "socketioxide", "engineioxide"]),
    ("borealis-workflows", &["axum", "socketioxide", "engineioxide"]),
    ("borealis-workers", &["axum", "socketioxide", "engineioxide"]),
    ("borealis-agent", &["sqlx", "axum", "apalis", "socketioxide"]),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// What cargo knows of the workspace and of everything it links on this platform. Cargo may fetch what is not there: a machine
/// that has only built the workspace has no crates of other platforms.
fn metadata() -> Value {
    let output = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()))
        .args(["metadata", "--format-version", "1", "--locked", "--filter-platform", &platform()])
        .current_dir(root())
        .output()
        .expect("cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo's JSON")
}

/// The target triple of this machine.
fn platform() -> String {
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let output = Command::new(rustc).arg("-vV").current_dir(root()).output().expect("rustc");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let host = said.lines().find_map(|line| line.strip_prefix("host: "));
    host.unwrap_or_else(|| panic!("rustc names no host: {said}")).to_owned()
}

/// The direct dependencies of every package that end in its binary, by package id.
fn graph(metadata: &Value) -> BTreeMap<&str, Vec<&str>> {
    let is_linked =
        |dependency: &&Value| dependency["dep_kinds"].as_array().into_iter().flatten().any(|kind| kind["kind"].is_null());
    metadata["resolve"]["nodes"]
        .as_array()
        .expect("a resolved graph")
        .iter()
        .map(|node| {
            let linked = node["deps"].as_array().into_iter().flatten().filter(is_linked);
            (node["id"].as_str().expect("an id"), linked.filter_map(|dependency| dependency["pkg"].as_str()).collect())
        })
        .collect()
}

fn names(metadata: &Value) -> BTreeMap<&str, &str> {
    let packages = metadata["packages"].as_array().expect("packages");
    packages.iter().filter_map(|package| Some((package["id"].as_str()?, package["name"].as_str()?))).collect()
}

fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a source folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("a source file");
                found.push((path, text));
            }
        }
    }
    assert!(!found.is_empty(), "no sources in {folder}");
    found
}

/// The lines of a source that are not comments, numbered from one.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(at, line)| (at + 1, line)).filter(|(_, line)| !line.trim_start().starts_with("//"))
}

#[test]
fn only_the_allowed_arrows_exist() {
    let metadata = metadata();
    let names = names(&metadata);
    let members: BTreeSet<&str> =
        metadata["workspace_members"].as_array().expect("members").iter().filter_map(Value::as_str).collect();
    let allowed: BTreeMap<&str, &[&str]> = ARROWS.into_iter().collect();
    assert_eq!(
        members.iter().map(|id| names[id]).collect::<BTreeSet<_>>(),
        allowed.keys().copied().collect::<BTreeSet<_>>(),
        "a crate came or went: say what it may know"
    );
    // All kinds of dependency, so that tests do not reach around the plan either.
    for node in metadata["resolve"]["nodes"].as_array().expect("a resolved graph") {
        let id = node["id"].as_str().expect("an id");
        if !members.contains(id) {
            continue;
        }
        for dependency in node["deps"].as_array().into_iter().flatten().filter_map(|dependency| dependency["pkg"].as_str()) {
            let is_allowed = !members.contains(dependency) || allowed[names[id]].contains(&names[dependency]);
            assert!(is_allowed, "{} must not depend on {}", names[id], names[dependency]);
        }
    }
}

#[test]
fn rooms_do_not_link_what_they_must_not_know() {
    let metadata = metadata();
    let (names, graph) = (names(&metadata), graph(&metadata));
    for (room, absent) in ABSENT {
        let (start, _) = names.iter().find(|(_, name)| **name == room).unwrap_or_else(|| panic!("no crate {room}"));
        let mut seen = BTreeMap::from([(*start, room.to_owned())]);
        let mut open = vec![*start];
        while let Some(id) = open.pop() {
            for next in &graph[id] {
                if !seen.contains_key(next) {
                    seen.insert(next, format!("{} -> {}", seen[id], names[next]));
                    open.push(next);
                }
            }
        }
        for (id, way) in &seen {
            let is_absent = absent.iter().all(|start| !names[id].starts_with(start));
            assert!(is_absent, "{room} links {}: {way}", names[id]);
        }
        assert!(seen.len() > 3, "{room} seems to depend on nothing; is the graph read rightly?");
    }
}

#[test]
fn the_api_contains_no_sql() {
    let words = ["SELECT ", "INSERT INTO", "UPDATE ", "DELETE FROM", "BEGIN;"];
    for (path, text) in sources("api/src") {
        for (line, code) in code(&text) {
            let place = format!("{}:{line}: {code}", path.display());
            assert!(!code.contains("sqlx::query") && !code.contains("raw_sql("), "{place}");
            let quoted: String = code.split('"').skip(1).step_by(2).collect();
            assert!(!words.iter().any(|word| quoted.starts_with(word)), "{place}");
        }
        let is_route = path.components().any(|part| part.as_os_str() == "routes");
        assert!(!is_route || code(&text).all(|(_, code)| !code.contains("sqlx")), "{} knows sqlx", path.display());
    }
}

/// What `lower` makes of a name depends on the locale of the database; keys do not (`engine/src/names.rs`).
#[test]
fn no_sql_compares_names_by_the_locale() {
    // The audit's events from before there were keys; texts that are ASCII, in a collation that knows no other.
    let allowed = ["lower(actor_name)", "COLLATE \"C\")", "lower(display_name)", "lower(replace("];
    for folder in ["engine/src", "workflows/src", "workflows/durable/src"] {
        for (path, text) in sources(folder) {
            for (line, code) in code(&text).filter(|(_, code)| code.contains("lower(") || code.contains("ILIKE")) {
                let in_rust = code.contains(".to_lower") && !code.contains(" lower(");
                let is_allowed = in_rust || allowed.iter().any(|text| code.contains(text));
                assert!(is_allowed, "{}:{line}: {code}", path.display());
            }
        }
    }
}

#[test]
fn socket_events_are_named_in_one_place() {
    let mut handlers = 0;
    for (path, text) in sources("api/src/sockets") {
        for (line, code) in code(&text).filter(|(_, code)| code.contains("socket.on(")) {
            assert!(code.contains("socket.on(event.name(), "), "name it in events.rs: {}:{line}: {code}", path.display());
            handlers += 1;
        }
    }
    assert!(handlers > 0, "are handlers registered in another way now?");
}

#[test]
fn handlers_use_the_extractors_that_answer_in_our_form() {
    for (path, text) in sources("api/src/routes") {
        for (line, code) in code(&text) {
            let place = format!("{}:{line}: {code}", path.display());
            // `use axum::extract::{...}`: a list of imports stays on one line, or is looked at line by line below.
            let imports = code.contains("axum::extract::") || code.contains("extract::{");
            let words: Vec<&str> = code.split(|character: char| !character.is_alphanumeric() && character != '_').collect();
            assert!(!imports || !words.contains(&"Path"), "use crate::body::Path: {place}");
            assert!(!imports || !words.contains(&"Query"), "use crate::body::Params: {place}");
        }
    }
}

/// A database that has run a migration refuses it when it reads otherwise, and cannot be upgraded any more.
#[test]
fn a_migration_stays_as_it_was_written() {
    let folder = root().join("migrations");
    let list = std::fs::read_to_string(folder.join("published.sha256")).expect("the list of migrations");
    let known: BTreeMap<&str, &str> =
        list.lines().filter_map(|line| line.split_once("  ")).map(|(sum, name)| (name, sum)).collect();
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(&folder).expect("the migrations") {
        let path = entry.expect("a file").path();
        if path.extension().is_some_and(|extension| extension == "sql") {
            let digest = Sha256::digest(std::fs::read(&path).expect("a migration"));
            let sum: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            found.insert(path.file_name().expect("a name").to_string_lossy().into_owned(), sum);
        }
    }
    let found: BTreeMap<&str, &str> = found.iter().map(|(name, sum)| (name.as_str(), sum.as_str())).collect();
    assert_eq!(found, known, "write a migration of its own, and add its line: sha256sum in migrations/ to published.sha256");
}

/// White space counts once, and quotes as they are in the text itself.
fn plain(text: &str) -> String {
    let joined: Vec<&str> =
        text.split("\\\n").enumerate().map(|(at, line)| if at == 0 { line } else { line.trim_start() }).collect();
    joined.concat().replace("\\\"", "\"").replace("\\\\", "\\").split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn every_checked_query_is_in_the_sources() {
    let all: String = ["engine", "workflows", "workers", "api", "telemetry"]
        .iter()
        .flat_map(|folder| sources(folder))
        .map(|(_, text)| plain(&text) + "\n")
        .collect();
    let mut unused = Vec::new();
    for file in std::fs::read_dir(root().join(".sqlx")).expect("the checked queries") {
        let path = file.expect("a file").path();
        let checked: Value = serde_json::from_str(&std::fs::read_to_string(&path).expect("a file")).expect("a checked query");
        let query = plain(checked["query"].as_str().expect("a query"));
        if !all.contains(&query) {
            unused.push(format!("{}: {}", path.display(), query.chars().take(80).collect::<String>()));
        }
    }
    assert!(unused.is_empty(), "no source has these; remove them: {unused:#?}");
}

/// A promise that names its test is kept by that test. What the docs write in backticks with three underscores or more is the name of a
/// function.
#[test]
fn tests_that_the_docs_name_exist() {
    let functions: BTreeSet<String> = ["agent", "api", "engine", "tasks", "telemetry", "tests", "workers", "workflows"]
        .iter()
        .flat_map(|folder| sources(folder))
        .flat_map(|(_, text)| {
            let names = text.split("fn ").skip(1).map(|rest| rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next());
            names.flatten().map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    let docs = root().join("docs");
    let mut pages = vec![docs.join("security.md"), docs.join("architecture.md")];
    pages.extend(std::fs::read_dir(docs.join("compatibility")).expect("the folder").map(|file| file.expect("a file").path()));
    let (mut named, mut missing) = (0, Vec::new());
    for page in pages {
        let text = std::fs::read_to_string(&page).expect("a page");
        for name in text.split('`').skip(1).step_by(2) {
            let is_name =
                name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_') && name.matches('_').count() >= 3;
            if is_name {
                named += 1;
                if !functions.contains(name) {
                    missing.push(format!("{}: {name}", page.display()));
                }
            }
        }
    }
    assert!(named > 100, "{named}");
    assert!(missing.is_empty(), "{missing:#?}");
}

/// Licences under which a dependency may be used, as SPDX names them.
const LICENCES: [&str; 12] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MPL-2.0",
    "Unicode-3.0",
    "Zlib",
];
/// Crates that name no licence and have the text of MIT in a file.
const MIT_BY_FILE: [&str; 1] = ["apalis-postgres"];
/// How many crates may be linked in two versions. Each costs time at every first build; what is added for one has to go for another.
const TWICE_MAX: usize = 32;

/// Whether an expression of SPDX can be met with [`LICENCES`]. The older form has `/` for OR.
fn is_allowed(expression: &str) -> bool {
    let expression = expression.replace('/', " OR ").replace(['(', ')'], "");
    // Brackets are dropped and OR is read before AND: right for `(A OR B) AND C`, and never more lenient than SPDX.
    expression.split(" AND ").all(|all| all.split(" OR ").any(|one| LICENCES.contains(&one.trim())))
}

#[test]
fn dependencies_may_be_used_and_come_from_the_registry() {
    let metadata = metadata();
    let linked: BTreeSet<&str> = metadata["resolve"]["nodes"]
        .as_array()
        .expect("a resolved graph")
        .iter()
        .filter_map(|node| node["id"].as_str())
        .collect();
    let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let mut wrong = Vec::new();
    let packages = metadata["packages"].as_array().expect("packages").iter();
    for package in packages.filter(|package| package["id"].as_str().is_some_and(|id| linked.contains(id))) {
        let text = |field: &str| package[field].as_str().unwrap_or_default();
        let (name, version) = (text("name"), text("version"));
        versions.entry(name).or_default().insert(version);
        let Some(source) = package["source"].as_str() else { continue };
        if source != "registry+https://github.com/rust-lang/crates.io-index" {
            wrong.push(format!("{name} {version} comes from {source}"));
        }
        if !is_allowed(text("license")) && !MIT_BY_FILE.contains(&name) {
            wrong.push(format!("{name} {version} is under {:?}", text("license")));
        }
    }
    assert!(versions.len() > 300, "{}", versions.len());
    assert!(wrong.is_empty(), "{wrong:#?}");
    let twice: Vec<&&str> = versions.iter().filter(|(_, versions)| versions.len() > 1).map(|(name, _)| name).collect();
    assert!(twice.len() <= TWICE_MAX, "{} crates are linked in two versions: {twice:?}", twice.len());
    for (expression, allowed) in [
        ("MIT", true),
        ("GPL-3.0", false),
        ("GPL-3.0 OR MIT", true),
        ("MIT AND GPL-3.0", false),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", true),
        ("", false),
    ] {
        assert_eq!(is_allowed(expression), allowed, "{expression}");
    }
}
