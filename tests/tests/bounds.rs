//! What a stranger can make the engine hold or do: memory for bodies and frames, connections, numbers beyond all columns.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use borealis_api::connections::WRITE_STALL;
use borealis_tests::{
    Actor, House, Processes, Reply, TestDatabase, TestEngine, actor::Credential, agent, engine::PASSWORD, eventually, memory, raw,
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const MIB: usize = 1024 * 1024;

fn token(actor: &Actor) -> String {
    let Credential::Bearer(token) = &actor.credential else { panic!("{} has no token", actor.name) };
    token.clone()
}

/// The smallest values there are, as a list of this many bytes at most.
fn smallest(bytes: usize) -> String {
    let item = r#"{"":0},"#;
    let mut text = item.repeat(bytes.saturating_sub(2) / item.len());
    text.pop();
    format!("[{text}]")
}

/// The operations of the document that take a body: method, path, whether for devices, the properties, and the largest body in bytes.
fn with_bodies(document: &Value) -> Vec<(String, String, bool, Vec<String>, usize)> {
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, operation) in item.as_object().expect("operations") {
            let body = &operation["requestBody"];
            if body.is_null() {
                continue;
            }
            let mut schema = &body["content"]["application/json"]["schema"];
            while let Some(name) = schema["$ref"].as_str().and_then(|name| name.rsplit('/').next()) {
                schema = &document["components"]["schemas"][name];
            }
            let properties = schema["properties"].as_object().into_iter().flatten().map(|(name, _)| name.clone()).collect();
            let said =
                body["description"].as_str().unwrap_or_else(|| panic!("{method} {path} does not say how large its body may be"));
            let number = said.split(' ').find_map(|word| word.parse::<usize>().ok()).expect("a number of KiB");
            let device = operation["security"].to_string().contains("device_token");
            operations.push((method.to_uppercase(), path.clone(), device, properties, number * 1024));
        }
    }
    operations
}

#[tokio::test]
async fn no_body_makes_a_process_large() {
    let database = TestDatabase::start().await;
    let url = database.url.clone();
    // Passkeys need a name.
    let named = |_, processes: &mut Processes| {
        processes.set("BOREALIS_PUBLIC_BASE_URL", "http://localhost:1");
    };
    let mut house = House::open_with(database, &[url], &[], named).await;
    let device = house.device().await;
    let document = house.admin.get("/api/openapi.json").await.ok();
    let mut operations = with_bodies(&document);
    operations.sort_by_key(|operation| operation.4);
    assert!(operations.len() > 30 && operations.last().is_some_and(|largest| largest.4 == 32 * MIB), "{operations:?}");
    let pid = house.apis[0].process.as_ref().expect("a process").pid();
    let _ = house.admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    // The set-up has hashed passwords.
    let before = eventually("the memory of the hashes is given back", Duration::from_secs(20), async || {
        let resident = memory::resident(pid);
        (resident < 80 * MIB).then_some(resident)
    })
    .await;
    for (method, path, for_device, properties, limit) in &operations {
        let who = if *for_device { &device.actor } else { &house.admin };
        let target: String =
            path.split('/').skip(1).map(|part| format!("/{}", if part.starts_with('{') { "1" } else { part })).collect();
        let mut bodies = vec![smallest(*limit)];
        // One of the properties is the one that is read into a tree, if any.
        let known: Vec<&str> =
            properties.iter().map(String::as_str).chain(["details", "inventory", "agent_role_health"]).collect();
        let share = limit / known.len();
        let parts: Vec<String> =
            known.iter().map(|name| format!("\"{name}\":{}", smallest(share.saturating_sub(name.len() + 8)))).collect();
        bodies.push(format!("{{{}}}", parts.join(",")));
        for name in known.iter().filter(|name| ["payload", "credential", "components", "details"].contains(name)) {
            // As many values as are read, and the rest of the body is white space.
            let most = if *limit > MIB { 99_000 } else { 990 } / 3;
            let list = vec![r#"{"":0}"#; most].join(",");
            let text = format!("{{\"{name}\":{{\"x\":[{list}]}}}}");
            bodies.push(format!("{text}{}", " ".repeat(limit - text.len())));
        }
        for body in bodies {
            assert!(body.len() <= *limit && (body.len() + 1_000 > *limit), "{method} {path}: {} of {limit}", body.len());
            memory::forget_peak(pid);
            let method = reqwest::Method::from_bytes(method.as_bytes()).expect("a method");
            let request = who.request(method.clone(), &target).header("Content-Type", "application/json");
            let start: String = body.chars().take(40).collect();
            let reply = who.send(request.body(body)).await;
            assert!(reply.status < 500, "{method} {target} {start}: {} {}", reply.status, reply.text);
            let peak = memory::peak(pid);
            assert!(
                peak < 10 * limit + 100 * MIB,
                "{method} {target} {start}: {} MiB for a body of {} KiB",
                peak / MIB,
                limit / 1024
            );
        }
    }
    let mut socket = agent::open_agent(house.apis[0].addr, &token(&device)).await.expect("a socket");
    let agent_id = format!("MACHINE_{}_SYSTEM", device.guid);
    assert_eq!(socket.hello(&agent_id, json!({})).await["status"], "ok");
    for bytes in [12 * MIB, 15 * MIB] {
        memory::forget_peak(pid);
        socket.raw(&format!("42[\"quick_job_result\",{{\"job_id\":1,\"metadata\":{}}}]", smallest(bytes))).await;
        // It is still served, so the message has been looked at.
        assert_eq!(socket.hello(&agent_id, json!({})).await["status"], "ok");
        let peak = memory::peak(pid);
        assert!(peak < 10 * bytes + 100 * MIB, "{} MiB for a frame of {} MiB", peak / MIB, bytes / MIB);
    }
    drop(socket);
    eventually("memory is given back", Duration::from_secs(20), async || {
        (memory::resident(pid) < before + 64 * MIB).then_some(())
    })
    .await;
}

#[tokio::test]
async fn many_large_bodies_at_once_wait_for_room() {
    let database = TestDatabase::start().await;
    let url = database.url.clone();
    let mut house = House::open(database, &[url], &[]).await;
    let mut devices = Vec::new();
    for _ in 0..6 {
        devices.push(house.device().await);
    }
    let pid = house.apis[0].process.as_ref().expect("a process").pid();
    memory::forget_peak(pid);
    let list = vec![r#"{"":0}"#; 80_000].join(",");
    let start = format!("{{\"hostname\":\"x\",\"details\":{{\"processes\":[\"{}\"],\"x\":[{list}]}}}}", "y".repeat(5 * MIB));
    let body = format!("{start}{}", " ".repeat(24 * MIB - start.len()));
    let sent = devices.iter().flat_map(|device| [device, device]).map(|device| {
        let request = device.request(reqwest::Method::POST, "/api/agent/details").header("Content-Type", "application/json");
        device.send(request.body(body.clone()))
    });
    for reply in futures::future::join_all(sent).await {
        assert!([413, 429, 503].contains(&reply.status), "{} {}", reply.status, reply.text);
    }
    let peak = memory::peak(pid);
    assert!(peak < 1024 * MIB, "{} MiB for twelve bodies of 24 MiB", peak / MIB);
}

#[tokio::test]
async fn sign_ins_leave_no_memory_behind() {
    let database = TestDatabase::start().await;
    let url = database.url.clone();
    let house = House::open(database, &[url], &[]).await;
    let pid = house.apis[0].process.as_ref().expect("a process").pid();
    let nobody = Actor::anonymous(&house.admin.base);
    let sign_in = async || nobody.post("/api/auth/login", json!({"username": "admin", "password": PASSWORD})).await;
    let (first, second) = (sign_in().await, sign_in().await);
    assert_eq!((first.status, second.status), (200, 200), "{} {}", first.text, second.text);
    eventually("the memory of the hashes is given back", Duration::from_secs(20), async || {
        (memory::resident(pid) < 80 * MIB).then_some(())
    })
    .await;
}

/// Connects, asks for a large answer many times and reads nothing of it.
async fn never_reads(addr: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(addr).await.expect("a connection");
    let request = format!("GET /api/openapi.json HTTP/1.1\r\nHost: {addr}\r\n\r\n").repeat(400);
    let _ = tokio::time::timeout(Duration::from_secs(5), stream.write_all(request.as_bytes())).await;
    stream
}

#[tokio::test]
async fn clients_that_never_read_are_cut_and_hold_little() {
    const CLIENTS: usize = 200;
    let engine = TestEngine::start().await;
    let started = Instant::now();
    let streams = futures::future::join_all((0..CLIENTS).map(|_| never_reads(engine.addr))).await;
    let begun = Instant::now();
    let (mut most, mut open) = (0, streams);
    while !open.is_empty() {
        most = most.max(memory::queued(engine.addr.port()));
        let mut left = Vec::new();
        for stream in open {
            // A reset shows without reading.
            if stream.take_error().expect("a socket").is_none() {
                left.push(stream);
            }
        }
        open = left;
        let age = begun.elapsed();
        assert!(age < WRITE_STALL + Duration::from_secs(10), "{} of {CLIENTS} still held after {age:?}", open.len());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    println!(
        "{CLIENTS} clients: all cut {:?} after the first came, at most {} KiB in the kernel",
        started.elapsed(),
        most / 1024
    );
    assert!(most < 64 * MIB, "{} MiB in the kernel", most / MIB);
    // Others are served all the while.
    assert_eq!(engine.anonymous().get("/health").await.ok()["status"], "ok");
}

#[tokio::test]
async fn an_address_has_so_many_connections_and_a_known_proxy_any_number() {
    let open = async |engine: &TestEngine, count: usize| {
        let mut streams = Vec::new();
        for _ in 0..count {
            streams.push(TcpStream::connect(engine.addr).await.expect("a connection"));
        }
        streams
    };
    let health = async |engine: &TestEngine| raw::request(engine.addr, "GET", "/health", &[]).await;
    let engine = TestEngine::with(|settings| settings.connections_per_address = 20).await;
    let held = open(&engine, 20).await;
    let refused = eventually("there is no room", Duration::from_secs(10), async || {
        let reply = health(&engine).await;
        (reply.status == 503).then_some(reply)
    })
    .await;
    assert_eq!((refused.header("retry-after"), &refused.body["error"]), (Some("5"), &json!("too_many_connections")));
    drop(held);
    eventually("there is room again", Duration::from_secs(10), async || (health(&engine).await.status == 200).then_some(()))
        .await;

    let behind = TestEngine::with(|settings| {
        settings.connections_per_address = 20;
        settings.trusted_proxies = "127.0.0.1".parse().expect("an address");
    })
    .await;
    let held = open(&behind, 60).await;
    assert_eq!(health(&behind).await.status, 200);
    drop(held);
}

/// One kept-alive connection on which requests follow each other.
struct Kept {
    addr: SocketAddr,
    stream: Option<TcpStream>,
    opened: usize,
}

impl Kept {
    /// Sends a request whose body comes a moment after its head. Every request is answered, or this panics.
    async fn post(&mut self, body: &[u8]) -> Reply {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            none => {
                self.opened += 1;
                none.insert(TcpStream::connect(self.addr).await.expect("a connection"))
            }
        };
        let head = format!(
            "POST /api/sites HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.expect("the head is taken");
        tokio::task::yield_now().await;
        // An answer may come before all of it was taken.
        let _ = stream.write_all(body).await;
        let mut answer = Vec::new();
        let mut piece = [0; 4096];
        let reply = loop {
            let read = stream.read(&mut piece).await.expect("an answer");
            assert!(
                read > 0,
                "closed without an answer to a body of {} bytes: {:?}",
                body.len(),
                String::from_utf8_lossy(&answer)
            );
            answer.extend_from_slice(&piece[..read]);
            if let Some(reply) = raw::whole(&answer) {
                break reply;
            }
        };
        if reply.header("connection") == Some("close") {
            self.stream = None;
        }
        reply
    }
}

#[tokio::test]
async fn every_refusal_with_an_unread_body_reaches_its_client() {
    let engine = TestEngine::start().await;
    let clients = (0..20).map(|client| {
        let mut kept = Kept { addr: engine.addr, stream: None, opened: 0 };
        async move {
            for round in 0..200 {
                let size = [2, 20, 700, 5_000, 60_000, 300_000][(client + round) % 6];
                let reply = kept.post(&vec![b' '; size]).await;
                assert_eq!(reply.status, 401, "{}", reply.text);
            }
            kept.opened
        }
    });
    let opened = futures::future::join_all(clients).await;
    // What is short is read, and its connection goes on; one in six is too long.
    assert!(opened.iter().all(|opened| *opened <= 60), "{opened:?}");
}

#[tokio::test]
async fn numbers_beyond_every_column_are_refused() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let (site, _) = engine.site("Lab").await;
    let device = engine.device(site).await;
    let script = json!({"domain": "user", "display_name": "x", "payload": {"type": "bash", "script": "true"}});
    let script = admin.post("/api/assemblies", script).await.expect(201).body["assembly_guid"].clone();
    let job = json!({
        "name": "x", "schedule": {"type": "immediately"}, "components": [{"kind": "script", "assembly_guid": script}],
        "targets": [{"kind": "device", "device_guid": device.guid, "hostname": device.hostname}],
    });
    let job = admin.post("/api/scheduled_jobs", job).await.ok()["job"]["id"].to_string();
    let document = admin.get("/api/openapi.json").await.ok();
    let numbers = [
        "-9223372036854775808",
        "-9223372036854775807",
        "-99999999999999",
        "-2147483649",
        "-1",
        "0",
        "2147483648",
        "99999999999999",
        "253402300800",
        "9223372036854775",
        "9223372036854775807",
        "9223372036854775808",
        "1e30",
        "99999999999999999999999999",
    ];
    const FEW: [&str; 4] = ["-9223372036854775808", "99999999999999", "9223372036854775807", "1e30"];
    let mut asked = 0;
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, operation) in item.as_object().expect("operations") {
            let method = method.to_uppercase();
            // These end the test's own session or set-up, ask somebody outside, or never end.
            if ["/api/auth/logout", "/api/auth/sessions", "/api/bootstrap", "/api/aegis", "/api/github", "/api/runs/{id}/events"]
                .iter()
                .any(|left_alone| path.starts_with(left_alone))
            {
                continue;
            }
            let who: &Actor = if operation["security"].to_string().contains("device_token") { &device } else { &admin };
            let parameters: Vec<&Value> = operation["parameters"].as_array().into_iter().flatten().collect();
            let name = |parameter: &Value| parameter["name"].as_str().expect("a name").to_owned();
            let whole = |parameter: &Value| parameter["schema"]["type"].to_string().contains("integer");
            for number in numbers {
                let mut targets = Vec::new();
                let real = |part: &str| match part {
                    part if !part.starts_with('{') => part.to_owned(),
                    "{guid}" | "{hostname}" => device.guid.clone(),
                    _ => job.clone(),
                };
                let plain: String = path.split('/').skip(1).map(|part| format!("/{}", real(part))).collect();
                for parameter in parameters
                    .iter()
                    .filter(|parameter| whole(parameter) || ["cursor", "site"].contains(&name(parameter).as_str()))
                {
                    if parameter["in"] == "query" {
                        targets.push(format!("{plain}?{}={number}", name(parameter)));
                        targets.push(format!("{plain}?{}={number}-{number}", name(parameter)));
                    }
                }
                if path.contains('{') {
                    let odd =
                        path.split('/').skip(1).map(|part| format!("/{}", if part.starts_with('{') { number } else { part }));
                    targets.push(odd.collect());
                }
                let mut bodies = vec![None];
                let mut schema = &operation["requestBody"]["content"]["application/json"]["schema"];
                while let Some(name) = schema["$ref"].as_str().and_then(|name| name.rsplit('/').next()) {
                    schema = &document["components"]["schemas"][name];
                }
                for (property, shape) in schema["properties"].as_object().into_iter().flatten() {
                    if shape["type"].to_string().contains("integer") || shape["type"].is_null() {
                        let body = format!("{{\"{property}\":{number}}}");
                        bodies.push(serde_json::from_str::<Value>(&body).ok());
                    }
                }
                if bodies.len() > 1 {
                    targets.push(plain);
                }
                for target in targets {
                    for body in bodies.iter().filter(|body| body.is_none() || FEW.contains(&number)) {
                        let reply = who.call(&method, &target, body.as_ref()).await;
                        asked += 1;
                        assert!(reply.status != 500, "{method} {target} {body:?}: {}", reply.text);
                    }
                }
            }
        }
    }
    assert!(asked > 500, "{asked}");
    let target = format!("/api/scheduled_jobs/{job}/devices?occurrence=99999999999999");
    let reply = admin.get(&target).await.error(400, "invalid_query");
    assert!(reply.body["fields"]["occurrence"].is_string(), "{}", reply.text);
}

#[tokio::test]
async fn one_user_does_not_take_all_event_streams() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("Lab").await;
    let device = engine.device(site).await;
    let admin = engine.admin().await;
    let script = json!({"domain": "user", "display_name": "x", "payload": {"type": "bash", "script": "true"}});
    let script = admin.post("/api/assemblies", script).await.expect(201).body["assembly_guid"].clone();
    let job = json!({
        "name": "x", "schedule": {"type": "daily"}, "start": "2040-01-01T00:00:00Z",
        "components": [{"kind": "script", "assembly_guid": script}],
        "targets": [{"kind": "device", "device_guid": device.guid, "hostname": device.hostname}],
    });
    let job = admin.post("/api/scheduled_jobs", job).await.ok()["job"]["id"].to_string();
    let _ = admin.post(&format!("/api/scheduled_jobs/{job}/rerun"), json!({})).await;
    let run = eventually("there is a run", Duration::from_secs(20), async || {
        admin.get("/api/runs").await.ok()["runs"][0]["id"].as_str().map(str::to_owned)
    })
    .await;
    let stream = async |who: &Actor| {
        let mut stream = TcpStream::connect(engine.addr).await.expect("a connection");
        let head = format!(
            "GET /api/runs/{run}/events HTTP/1.1\r\nHost: x\r\nAccept: text/event-stream\r\nAuthorization: Bearer {}\r\n\r\n",
            token(who)
        );
        stream.write_all(head.as_bytes()).await.expect("a request");
        let mut answer = [0; 64];
        let read = stream.read(&mut answer).await.expect("an answer");
        let text = String::from_utf8_lossy(&answer[..read]).into_owned();
        (text.split(' ').nth(1).and_then(|status| status.parse::<u16>().ok()).expect("a status"), stream)
    };
    let mut open = Vec::new();
    let refused = loop {
        let (status, stream) = stream(&admin).await;
        if status != 200 {
            break status;
        }
        open.push(stream);
        assert!(open.len() < 100, "no end of streams");
    };
    assert_eq!(refused, 429);
    let other = engine.second_admin().await;
    assert_eq!(stream(&other).await.0, 200, "another user has streams of their own");
    drop(open);
    eventually("there is room again", Duration::from_secs(20), async || (stream(&admin).await.0 == 200).then_some(())).await;
}

#[tokio::test]
async fn enrollment_codes_are_for_those_who_may_rotate_them() {
    let engine = TestEngine::start().await;
    let admin = engine.admin().await;
    let (site, code) = engine.site("Lab").await;
    let operator = engine.operator(&[site]).await;
    let _ = admin.post("/api/auth/step-up", json!({"password": PASSWORD})).await.ok();
    let made = async |scopes: Value| {
        let body = json!({"name": "x", "scopes": scopes, "expires_in_days": 1});
        let token = admin.post("/api/auth/tokens", body).await.expect(201).body["token"].as_str().expect("a token").to_owned();
        Actor { credential: Credential::Bearer(token), ..admin.clone() }
    };
    let (reads, writes) = (made(json!(["read"])).await, made(json!(["read", "sites:write"])).await);
    for (who, seen) in [(&admin, code.as_str()), (&writes, code.as_str()), (&reads, ""), (&operator, "")] {
        assert_eq!(who.get("/api/sites").await.ok()["sites"][0]["enrollment_code"], seen, "{}", who.name);
    }
}
