//! Documents and what becomes of them, without a database.

use std::time::{Duration, Instant};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Map, Value, json};

use super::{
    FILES_SENT_MAX, SCRIPT_MAX,
    document::{Script, shown, stored},
    run::{Prepared, RunMode, prepare, request},
};
use crate::jobs::spec;

fn script(document: Value) -> Script {
    Script::parse(&document.to_string(), "").unwrap()
}

fn fault(document: Value) -> &'static str {
    Script::parse(&document.to_string(), "").unwrap_err().code
}

fn run(document: Value, values: Value) -> Prepared {
    prepare(&script(document), values.as_object().unwrap()).unwrap()
}

#[test]
fn bodies_are_read_in_every_form() {
    assert_eq!(script(json!({"type": "bash", "script_lines": ["a", "b"]})).content, "a\nb");
    assert_eq!(script(json!({"type": "bash", "script": "a\r\nb\rc"})).content, "a\nb\nc");
    assert_eq!(script(json!({"type": "bash", "content": "ZWNobyBoaQ==", "script_encoding": "base64"})).content, "echo hi");
    assert_eq!(Script::parse("echo hi", "bash").unwrap().content, "echo hi", "text is the script itself");
    assert_eq!(script(json!({"script": "x"})).script_type, "powershell");
    assert_eq!(script(json!({"script": "x"})).timeout_seconds, 3600);
    assert_eq!(script(json!({"script": "x", "timeout": "0"})).timeout_seconds, 0);
}

#[test]
fn bad_documents_are_refused() {
    for (document, code) in [
        (json!({"type": "bash"}), "invalid_payload"),
        (json!({"type": "bash", "script": "  "}), "invalid_payload"),
        (json!({"type": "bash", "script": 5}), "invalid_payload"),
        (json!({"type": "bash", "script_lines": ["a", 5]}), "invalid_payload"),
        (json!({"type": "bash", "script": "%%%", "script_encoding": "base64"}), "invalid_payload"),
        (json!({"type": "bash", "script": "//8=", "script_encoding": "base64"}), "invalid_payload"),
        (json!({"type": "bash", "script": "x", "script_encoding": "rot13"}), "invalid_payload"),
        (json!({"type": "bash", "script": "x", "timeout_seconds": -1}), "invalid_payload"),
        (json!({"type": "bash", "script": "x", "timeout_seconds": 1e12}), "invalid_payload"),
        (json!({"type": "bash", "script": "x", "variables": {}}), "invalid_payload"),
        (json!({"type": "bash", "script": "x", "variables": [{"label": "no name"}]}), "invalid_payload"),
        (
            json!({"type": "bash", "script": "x", "variables": [{"name": "n", "type": "number", "default": "1;rm"}]}),
            "invalid_payload",
        ),
        (json!({"type": "ansible", "script": "x"}), "unsupported_script_type"),
        (json!({"type": "python", "script": "x"}), "unsupported_script_type"),
    ] {
        assert_eq!(fault(document.clone()), code, "{document}");
    }
}

#[test]
fn values_win_over_defaults_and_reach_the_environment() {
    let document = json!({"type": "bash", "script": "echo $GREETING", "variables": [
        {"name": "greeting", "default": "hi"}, {"name": "loud", "type": "boolean", "default": "yes"},
        {"name": "my-path", "default_value": "/tmp"}, {"key": "count", "type": "number"}]});
    let run = run(document, json!({"greeting": "hello $(id)", "extra": null}));
    let get = |key: &str| run.environment.get(key).map(String::as_str);
    assert_eq!((get("GREETING"), get("greeting")), (Some("hello $(id)"), Some("hello $(id)")));
    assert_eq!((get("LOUD"), get("MY_PATH"), get("my_path"), get("my-path")), (Some("True"), Some("/tmp"), Some("/tmp"), None));
    assert_eq!((get("COUNT"), get("EXTRA")), (Some(""), Some("")));
    assert_eq!(run.content, "echo $GREETING", "bash reads the environment");
    assert_eq!(run.variables[0], json!({"name": "greeting", "label": "greeting", "type": "string", "value": "hello $(id)"}));
}

#[test]
fn no_value_of_an_operator_becomes_powershell() {
    let document = json!({"type": "powershell",
        "script": "Write-Host \"Hi $env:name and $ENV:{my name}\"\nif ($env:Flag) { $n = $env:count + 1 }\n$env:name = 'x'; `$env:name; $env:PATH; $env:names",
        "variables": [{"name": "name"}, {"name": "my name"}, {"name": "flag", "type": "boolean"}, {"name": "count", "type": "number"}]});
    let evil = "\"; Remove-Item C:\\ -Recurse; '’; $(calc) #";
    let run = run(document.clone(), json!({"name": evil, "my name": evil, "flag": true, "count": "-1.5e3"}));
    assert_eq!(
        run.content,
        "Write-Host \"Hi ${env:NAME} and ${env:MY_NAME}\"\nif ($true) { $n = -1.5e3 + 1 }\n$env:name = 'x'; `$env:name; $env:PATH; $env:names"
    );
    assert_eq!(run.environment.get("NAME").map(String::as_str), Some(evil));
    for bad in ["1; calc", "0x10", "1e", "--1", "$(calc)", "1 2", ".5", "Infinity", "१"] {
        let values = json!({"count": bad});
        let error = prepare(&script(document.clone()), values.as_object().unwrap()).unwrap_err();
        assert_eq!((error.code, error.fields.contains_key("variable_values.count")), ("invalid_variable_value", true), "{bad}");
    }
    let values = json!({"flag": "$(calc)"});
    assert!(prepare(&script(document), values.as_object().unwrap()).is_err());
}

#[test]
fn a_request_is_what_an_agent_reads() {
    let script = script(json!({"type": "bash", "script": "echo hi", "timeout_seconds": 1}));
    let prepared = || prepare(&script, json!({"who": "me"}).as_object().unwrap()).unwrap();
    let mut payload = request("n", "p", &script, prepared(), RunMode::Session(3));
    for absent in ["job_id", "target_hostname", "context", "signature", "sig_alg", "signing_key", "envelope"] {
        assert!(payload.get(absent).is_none(), "{absent}");
    }
    payload["job_id"] = json!(7);
    payload["target_hostname"] = json!("h");
    payload["context"] = json!({});
    let read: borealis_protocol::events::QuickJobRun = serde_json::from_value(payload).unwrap();
    assert_eq!(STANDARD.decode(&read.script_content).unwrap(), b"echo hi");
    assert_eq!((read.session_target.as_deref(), read.target_session_id), (Some("specific_session"), Some(3)));
    assert_eq!((read.run_mode.as_str(), read.admin_user.as_str(), read.timeout_seconds), ("currentuser", "", 1));
    assert_eq!(read.environment.get("WHO").map(String::as_str), Some("me"));
    assert!(request("n", "p", &script, prepared(), RunMode::System).get("session_target").is_none());
}

#[test]
fn files_travel_while_they_are_small() {
    let document = |data: String| {
        json!({"script": "x", "files": [{"name": "a.txt", "mimeType": "text/plain", "size": 3, "data": data},
        {"name": "no data"}, {"data": "no name"}, 5]})
    };
    let small = run(document("YWJj".into()), json!({}));
    assert_eq!(small.files, [json!({"file_name": "a.txt", "size": 3, "mime_type": "text/plain", "data": "YWJj"})]);
    let large = run(document("A".repeat(FILES_SENT_MAX + 1)), json!({}));
    assert_eq!(large.files, [json!({"file_name": "a.txt", "size": 3, "mime_type": "text/plain"})]);
}

#[test]
fn a_script_has_an_end() {
    assert_eq!(fault(json!({"script": "x".repeat(SCRIPT_MAX + 1)})), "script_too_large");
    assert_eq!(script(json!({"script": "x".repeat(SCRIPT_MAX)})).content.len(), SCRIPT_MAX);
}

#[test]
fn base64_without_a_word_about_it_is_decoded_and_a_command_is_not() {
    let content = |text: &str| script(json!({"type": "bash", "script": text})).content;
    let encoded = |text: &str| STANDARD.encode(text);
    let long = "#!/bin/bash\nset -e\necho \"größer\" # \u{1b}[1m\n".repeat(40);
    for text in ["echo hi", "id", "whoami", "#!/bin/sh\necho 'a b' && exit 3\n", &long] {
        assert_eq!(content(&encoded(text)), text.replace('\r', ""), "{text}");
        assert_eq!(content(&format!("{}\n", encoded(text))), text);
    }
    let lines: Vec<String> =
        encoded(&long).as_bytes().chunks(76).map(|line| String::from_utf8_lossy(line).into_owned()).collect();
    assert_eq!(content(&lines.join("\n")), long, "in lines, as base64 writes it");
    // All of them are valid base64.
    for text in [
        "hostname",
        "whoami12",
        "file",
        "envsubst",
        "date",
        "exit",
        "sync",
        "/usr/bin/foo",
        "test",
        "AAAAAAAAAAAAAAAA",
        "abcd\nabcd",
    ] {
        assert_eq!(content(text), text);
    }
    let plain = |text: &str| script(json!({"type": "bash", "script": text, "script_encoding": "plain"})).content;
    assert_eq!(plain("d2hvYW1p"), "d2hvYW1p", "who says so is believed");
    let sure = json!({"type": "bash", "script": encoded("echo hello world"), "script_encoding": "plain"});
    assert_eq!(fault(sure), "invalid_payload", "but not that this is a program");
    assert_eq!(Script::parse(&encoded("echo hello"), "bash").unwrap().content, "echo hello", "nor is text run as it is");
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_script() {
    let marked = "\u{feff}set -e\nfalse";
    for document in [
        json!({"type": "bash", "script": marked}),
        json!({"type": "bash", "script_lines": ["\u{feff}set -e", "false"]}),
        json!({"type": "bash", "content": marked, "script_encoding": "plain"}),
        json!({"type": "bash", "script": STANDARD.encode(marked), "script_encoding": "base64"}),
        json!({"type": "bash", "script": STANDARD.encode(marked)}),
    ] {
        assert_eq!(script(document.clone()).content, "set -e\nfalse", "{document}");
        let kept = stored(&document, "g").unwrap();
        assert!(!kept.contains('\u{feff}') && !kept.contains("77u/"), "{kept}");
        assert_eq!(Script::parse(&kept, "").unwrap().content, "set -e\nfalse");
    }
    assert_eq!(stored(&json!(marked), "g").unwrap(), "set -e\nfalse");
    assert_eq!(Script::parse(marked, "bash").unwrap().content, "set -e\nfalse");
    let text = format!("\u{feff}{}", json!({"type": "bash", "script": "id"}));
    assert_eq!(Script::parse(&stored(&json!(text), "g").unwrap(), "").unwrap().content, "id");
}

#[test]
fn what_is_stored_says_how_it_is_written() {
    let kept = |document: Value| serde_json::from_str::<Value>(&stored(&document, "g").unwrap()).unwrap();
    let plain = kept(json!({"type": "bash", "script": "hostname", "note": [1]}));
    assert_eq!(
        plain,
        json!({"type": "bash", "script": "hostname", "script_encoding": "plain", "note": [1], "assembly_guid": "g"})
    );
    let client = kept(json!({"type": "bash", "script": "ZWNobyBoaQ=="}));
    assert_eq!((&client["script"], &client["script_encoding"]), (&json!("echo hi"), &json!("plain")));
    let said = json!({"type": "bash", "script": "ZWNobyBoaQ==", "scriptEncoding": "base64", "assembly_guid": "g"});
    assert_eq!(kept(said.clone()), said, "what says so itself stays");
    // Text stays as it is, unless it could be taken for something else.
    let text = "{ \"type\":\"bash\", \"script\":\"hostname\" }";
    assert_eq!(stored(&json!(text), "g").unwrap(), text);
    let answer: Value = serde_json::from_str(shown(text).unwrap().get()).unwrap();
    assert_eq!((&answer["script"], &answer["script_encoding"]), (&json!("hostname"), &json!("plain")));
    let old: Value = serde_json::from_str(shown("{\"script\":\"ZWNobyBoaQ==\"}").unwrap().get()).unwrap();
    assert_eq!((&old["script"], &old["script_encoding"]), (&json!("echo hi"), &json!("plain")));
    assert!(shown("echo hi").is_none());
}

/// How long `work` takes on an input of that size, at best.
fn took(size: usize, make: impl Fn(usize) -> String, work: &impl Fn(&str)) -> Duration {
    let input = make(size);
    let once = |_| {
        let start = Instant::now();
        work(&input);
        start.elapsed()
    };
    (0..3).map(once).min().unwrap_or_default()
}

#[test]
fn eight_times_the_input_is_about_eight_times_the_work() {
    const SIZE: usize = 48 * 1024;
    let fill = |pattern: &str, size: usize| pattern.repeat(size / pattern.len() + 1);
    let powershell = |text: &str| {
        let parsed = Script::parse(text, "powershell").unwrap();
        let values: Map<String, Value> = (0..50).map(|n| (format!("value_{n}"), json!(n))).collect();
        let _ = prepare(&parsed, &values).unwrap();
    };
    let document = |text: &str| {
        let _ = stored(&json!(text), "g");
        let _ = shown(text);
        let _ = Script::parse(text, "bash");
    };
    let components = |text: &str| {
        let _ =
            serde_json::from_str::<Value>(text).map(|value| (spec::components(&value).is_ok(), spec::targets(&value).is_ok()));
    };
    let scripts =
        ["$env:{", "$env:{a", "$env:{value_1}", "$env:value_1 ", "$env:", "$", "`$env:a=", "$env:a    ", "\r", "a\r\n", "{", "}"];
    for pattern in scripts {
        let make = |size| format!("x{}", fill(pattern, size));
        assert_linear(pattern, took(SIZE, make, &powershell), took(8 * SIZE, make, &powershell));
    }
    for pattern in ["[", "{\"\":", "\"", "AAAA", "QUFB\n", " ", "\u{feff}", "{\"\":0},"] {
        let make = |size| fill(pattern, size);
        assert_linear(pattern, took(SIZE, make, &document), took(8 * SIZE, make, &document));
    }
    for item in ["{\"\":0}", "0", "\"a\"", "{\"name\":\"a\"}"] {
        for key in ["variables", "files", "script_lines", "script", "other"] {
            let make = |size| format!("{{\"script\":\"id\",\"{key}\":[{}0]}}", fill(&format!("{item},"), size));
            assert_linear(item, took(SIZE, make, &document), took(8 * SIZE, make, &document));
        }
        let make = |size| format!("[{}0]", fill(&format!("{item},"), size));
        assert_linear(item, took(SIZE, make, &components), took(8 * SIZE, make, &components));
    }
}

/// Linear work takes eight times as long, and quadratic work 64 times; noise lies in between.
fn assert_linear(what: &str, small: Duration, large: Duration) {
    assert!(large < small * 24 + Duration::from_millis(50), "{what:?}: {small:?}, then {large:?} for eight times as much");
}
