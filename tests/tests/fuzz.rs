//! Odd input of every kind, from seeds: every operation of the OpenAPI document with bodies, paths and queries that nearly fit, what
//! agents report over REST and sockets, and tokens. Nothing of it may be an internal error, end a process or make it forget its manners.
//!
//! `BOREALIS_FUZZ_ROUNDS` makes it go on for longer (1 by default), `BOREALIS_FUZZ_SEED` begins elsewhere.

use borealis_engine::{devices::ingest, enrollment::tokens, jobs::results};
use borealis_protocol::{events::QuickJobRun, framing};
use borealis_tests::{Actor, TestEngine, actor::Credential, engine::PASSWORD};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Map, Value, json};
use uuid::Uuid;

/// What ends the test's own session, its engine or its users, and what asks somebody outside.
const LEFT_ALONE: [&str; 13] = [
    "/api/aegis/",
    "/api/auth/logout",
    "/api/auth/login",
    "/api/auth/mfa/",
    "/api/auth/password/",
    "/api/auth/sessions",
    "/api/auth/step-up",
    "/api/bootstrap/",
    "/api/users/{username}",
    "/api/github/",
    "/api/directory/providers/certificate",
    "/api/docs",
    "/api/runs/{id}/events",
];

fn rounds() -> u64 {
    std::env::var("BOREALIS_FUZZ_ROUNDS").map_or(1, |text| text.parse().expect("a number of rounds"))
}

fn first_seed() -> u64 {
    std::env::var("BOREALIS_FUZZ_SEED").map_or(1, |text| text.parse().expect("a seed"))
}

struct Dice(StdRng);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    fn one_in(&mut self, n: u32) -> bool {
        self.0.random_ratio(1, n)
    }

    fn text(&mut self) -> String {
        const ODD: [&str; 24] = [
            "",
            " ",
            "\0",
            "a\0b",
            "0",
            "-1",
            "9223372036854775808",
            "null",
            "true",
            "\u{202e}gpj.exe",
            "' OR 1=1 --",
            "../../etc/passwd",
            "%00",
            "%2e%2e%2f",
            "{{7*7}}",
            "$(reboot)",
            "*)(uid=*",
            "\u{feff}",
            "\u{1f600}",
            "2026-02-30T25:61:61Z",
            "Europe/Nowhere",
            "00000000-0000-0000-0000-000000000000",
            "\r\nSet-Cookie: a=b",
            "\u{1b}[31m",
        ];
        match self.0.random_range(0..6) {
            0 => "x".repeat(self.0.random_range(0..5_000)),
            1 => (0..self.0.random_range(0..40)).map(|_| self.0.random::<char>()).collect(),
            2 => Uuid::from_u128(self.0.random()).to_string(),
            3 => self.0.random_range(-5..1_000_i64).to_string(),
            _ => (*ODD.choose(&mut self.0).expect("some")).to_owned(),
        }
    }

    fn odd(&mut self, depth: usize) -> Value {
        match self.0.random_range(0..if depth > 3 { 7 } else { 9 }) {
            0 => Value::Null,
            1 => self.0.random::<bool>().into(),
            2 => self.0.random::<i64>().into(),
            3 => (*[0, 1, -1, i64::MAX, i64::MIN, 2_147_483_648].choose(&mut self.0).expect("some")).into(),
            4 => json!(self.0.random::<f64>() * 1e300),
            5 | 6 => self.text().into(),
            7 => (0..self.0.random_range(0..4)).map(|_| self.odd(depth + 1)).collect(),
            _ => Value::Object((0..self.0.random_range(0..4)).map(|_| (self.text(), self.odd(depth + 1))).collect()),
        }
    }

    /// Something that a schema of the document asks for, more or less.
    fn of(&mut self, document: &Value, schema: &Value, depth: usize) -> Value {
        if depth > 6 || self.one_in(8) {
            return self.odd(depth);
        }
        if let Some(name) = schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()) {
            return self.of(document, &document["components"]["schemas"][name], depth + 1);
        }
        for several in ["oneOf", "anyOf", "allOf"] {
            if let Some(one) = schema[several].as_array().and_then(|all| all.choose(&mut self.0)) {
                return self.of(document, &one.clone(), depth + 1);
            }
        }
        if let Some(value) = schema["enum"].as_array().and_then(|all| all.choose(&mut self.0)) {
            return value.clone();
        }
        let kinds: Vec<&str> = match &schema["type"] {
            Value::Array(all) => all.iter().filter_map(Value::as_str).collect(),
            one => one.as_str().into_iter().collect(),
        };
        match kinds.choose(&mut self.0).copied() {
            Some("string") if self.one_in(2) => {
                (*["bash", "Hello", "daily", "2030-01-01T03:00:00Z"].choose(&mut self.0).expect("some")).into()
            }
            Some("string") => self.text().into(),
            Some("integer") if self.one_in(2) => self.0.random_range(0..5).into(),
            Some("integer") => self.0.random::<i64>().into(),
            Some("number") => json!(self.0.random::<f64>()),
            Some("boolean") => self.0.random::<bool>().into(),
            Some("null") => Value::Null,
            Some("array") => (0..self.0.random_range(0..4)).map(|_| self.of(document, &schema["items"], depth + 1)).collect(),
            Some("object") => self.object(document, schema, depth),
            _ => self.odd(depth),
        }
    }

    fn object(&mut self, document: &Value, schema: &Value, depth: usize) -> Value {
        let mut object = Map::new();
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            if !self.one_in(4) {
                let value = self.of(document, property, depth + 1);
                object.insert(name.clone(), value);
            }
        }
        if self.one_in(12) {
            object.insert(self.text(), self.odd(depth));
        }
        object.into()
    }

    /// The same with one thing changed somewhere.
    fn changed(&mut self, value: &Value) -> Value {
        match value {
            Value::Object(object) if !object.is_empty() && !self.one_in(6) => {
                let mut object = object.clone();
                let names: Vec<String> = object.keys().cloned().collect();
                let name = names.choose(&mut self.0).expect("some").clone();
                if self.one_in(8) {
                    object.remove(&name);
                } else {
                    let value = self.changed(&object[&name]);
                    object.insert(name, value);
                }
                object.into()
            }
            Value::Array(items) if !items.is_empty() && !self.one_in(6) => {
                let mut items = items.clone();
                let place = self.0.random_range(0..items.len());
                items[place] = self.changed(&items[place]);
                items.into()
            }
            _ => self.odd(0),
        }
    }

    /// The same with some of its bytes changed, lost or doubled.
    fn garbled(&mut self, text: &str) -> String {
        let mut bytes = text.as_bytes().to_vec();
        for _ in 0..self.0.random_range(1..4) {
            if bytes.is_empty() {
                break;
            }
            let place = self.0.random_range(0..bytes.len());
            match self.0.random_range(0..4) {
                0 => bytes[place] = self.0.random(),
                1 => drop(bytes.remove(place)),
                2 => bytes.insert(place, self.0.random()),
                _ => bytes.truncate(place),
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

fn encoded(text: &str) -> String {
    url::form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>().replace('+', "%20")
}

#[tokio::test]
async fn every_operation_says_what_is_wrong_with_what_nearly_fits() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let (site, _) = engine.site("North").await;
    let device = engine.device(site).await;
    let document = admin.get("/api/openapi.json").await.ok();
    let mut operations: Vec<(String, String, Value)> = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, operation) in item.as_object().expect("operations") {
            if !LEFT_ALONE.iter().any(|beginning| path.starts_with(beginning)) {
                operations.push((method.to_uppercase(), path.clone(), operation.clone()));
            }
        }
    }
    assert!(operations.len() > 60, "{}", operations.len());
    let mut answered = std::collections::BTreeMap::<u16, u32>::new();
    for seed in first_seed()..first_seed() + rounds() {
        let mut dice = Dice::new(seed);
        let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
        for (method, path, operation) in &operations {
            let who: &Actor = if operation["security"].to_string().contains("device_token") { &device } else { &admin };
            for _ in 0..12 {
                let mut target = String::new();
                for part in path.split('/').skip(1) {
                    let odd = part.starts_with('{');
                    let value = match dice.0.random_range(0..4) {
                        0 if odd => site.to_string(),
                        1 if odd => device.guid.clone(),
                        _ if odd => dice.text(),
                        _ => part.to_owned(),
                    };
                    target = format!("{target}/{}", if odd { encoded(&value) } else { value });
                }
                let mut query = Vec::new();
                for parameter in operation["parameters"].as_array().into_iter().flatten() {
                    if parameter["in"] == "query" && dice.one_in(2) {
                        query.push(format!("{}={}", parameter["name"].as_str().unwrap_or_default(), encoded(&dice.text())));
                    }
                }
                if !query.is_empty() && target.len() < 4_000 {
                    target = format!("{target}?{}", query.join("&"));
                }
                if target.len() > 8_000 {
                    continue;
                }
                let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
                let body = (!schema.is_null()).then(|| dice.of(&document, schema, 0));
                let reply = who.call(method, &target, body.as_ref()).await;
                *answered.entry(reply.status).or_default() += 1;
                let shown = || {
                    format!(
                        "seed {seed}: {method} {target} {}: {} {}",
                        body.clone().unwrap_or_default(),
                        reply.status,
                        reply.text
                    )
                };
                assert!(reply.status < 500 || [502, 503].contains(&reply.status), "{}", shown());
                assert!(reply.status < 400 || reply.body["error"].is_string(), "{}", shown());
            }
        }
        let _ = admin.get("/api/auth/me").await.ok();
    }
    assert!(answered.get(&200).is_some_and(|count| *count > 20), "it gets somewhere: {answered:?}");
    assert!(answered.get(&400).is_some_and(|count| *count > 100), "it tries something: {answered:?}");
}

#[tokio::test]
async fn whatever_an_agent_reports_is_stored_or_refused() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("North").await;
    let device = engine.device(site).await;
    let pool = &engine.database.pool;
    let Credential::Bearer(token) = &device.credential else { panic!("a token") };
    let claims = engine.app.keys.verify_access(token).expect("claims");
    let identity = tokens::identify(pool, &claims).await.expect("a device");
    let heartbeat = json!({
        "hostname": device.hostname, "service_mode": "system", "internal_ip": "10.0.0.5", "device_type": "Server", "agent_build_id": "1",
        "metrics": {"cpu_percent": 1.5, "memory_percent": 20, "uptime": 7, "last_user": "root", "operating_system": "Debian"},
        "inventory": {"memory": [{"slot": 1}], "network": [{"name": "eth0", "addresses": ["10.0.0.5"]}], "storage": [], "cpu": {"cores": 2}},
        "agent_role_health": {"roles": [{"role_id": "system:x", "status": "ok", "detail": "d", "updated_at": 1}], "updated_at": 1},
    });
    let status =
        json!({"agent_id": "a", "state": "running", "message": "m", "percent": 10, "milestones": [{"code": "x", "at": 1}]});
    let details = json!({
        "hostname": device.hostname, "agent_id": "a", "service_mode": "system",
        "details": {"summary": {"hostname": device.hostname, "operating_system": "Debian", "last_boot": "now"},
            "software": [{"name": "x", "version": "1"}], "services": [{"name": "ssh", "status": "running"}], "memory": [], "network": []},
    });
    let progress = json!({"job_id": 1, "status": "Success", "stdout": "o", "stderr": "e", "exit_code": 0, "append_output": true, "context": {}});
    for seed in first_seed()..first_seed() + rounds() * 400 {
        let mut dice = Dice::new(seed);
        let told = |what: &str, body: &Value, error: &borealis_engine::Error| {
            assert!(error.kind != borealis_engine::Kind::Bug, "seed {seed}: {what} {body}: {error:?}");
        };
        let body = dice.changed(&heartbeat);
        if let Some(object) = body.as_object() {
            let _ =
                ingest::heartbeat(pool, &identity, "SYSTEM", object).await.inspect_err(|error| told("heartbeat", &body, error));
        }
        let body = dice.changed(&status);
        if let Some(object) = body.as_object() {
            let _ = ingest::status(pool, &identity, "SYSTEM", object).await.inspect_err(|error| told("status", &body, error));
        }
        let body = dice.changed(&details);
        let raw = if dice.one_in(3) { dice.garbled(&body.to_string()) } else { body.to_string() };
        let _ =
            ingest::details(pool, &identity, "SYSTEM", raw.into_bytes()).await.inspect_err(|error| told("details", &body, error));
        let body = dice.changed(&progress);
        for kind in [results::Kind::Accepted, results::Kind::Progress, results::Kind::Result] {
            if let Some(report) = results::Report::parse(identity.guid, kind, &body) {
                let mut tx = pool.begin().await.expect("a transaction");
                let _ = results::apply(&mut tx, &[report]).await.inspect_err(|error| told("report", &body, error));
            }
        }
    }
}

#[test]
fn frames_jobs_and_tokens_are_read_or_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let keys = borealis_engine::keys::Keys::load_or_create(&folder.path().join("secrets"), None).expect("keys");
    let guid = Uuid::new_v4();
    let token = keys.sign_access(guid, "ab", 1, chrono::Utc::now()).expect("a token");
    let key = borealis_protocol::keys::SigningKey::from_bytes(&[7; 32]);
    let mut job =
        QuickJobRun { job_id: 1, script_content: borealis_protocol::keys::to_base64(b"echo"), ..QuickJobRun::default() };
    borealis_protocol::envelope::sign(&mut job, &key, &guid.to_string(), i64::MAX).expect("signed");
    let job = serde_json::to_value(&job).expect("JSON");
    let frame = framing::encode_event(Some(7), "quick_job_run", &job).expect("a frame");
    for seed in first_seed()..first_seed() + rounds() * 20_000 {
        let mut dice = Dice::new(seed);
        let _ = framing::decode(&dice.garbled(&frame));
        let _ = framing::decode(&dice.text());
        let odd = dice.garbled(&token);
        assert!(odd == token || keys.verify_access(&odd).is_err(), "seed {seed}: {odd}");
        let changed = dice.changed(&job);
        if let Ok(run) = serde_json::from_value::<QuickJobRun>(changed.clone()) {
            let checked = borealis_protocol::envelope::verify(&run, &key.verifying_key(), &guid.to_string(), 0);
            let same = |name: &str| changed[name] == job[name];
            let bound = ["job_id", "script_content", "environment", "variables", "timeout_seconds", "run_mode", "script_type"];
            assert!(checked.is_err() || bound.iter().all(|name| same(name) || changed[name].is_null()), "seed {seed}: {changed}");
        }
    }
}
