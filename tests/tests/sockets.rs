//! Agents' and operators' sockets, spoken to frame by frame: who gets in, what is delivered and to whom, whose results
//! count, and how soon a socket is closed.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use borealis_engine::{
    hold::NO_EPOCH,
    jobs::delivery::{self, Doubt},
};
use borealis_protocol::{envelope, events::QuickJobRun, keys};
use borealis_tests::{
    TestEngine,
    actor::Credential,
    agent::{self, Socket, open, open_agent},
    engine::Node,
    eventually,
};
use borealis_workers::api_client::{ApiClient, HostServiceEvent};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

const LIMIT: Duration = Duration::from_secs(10);

/// A machine as the database knows it, with a token.
struct Machine {
    guid: Uuid,
    site: i64,
    token: String,
}

impl Machine {
    fn agent_id(&self) -> String {
        borealis_protocol::agent_id("host", &self.guid.to_string(), borealis_protocol::CONTEXT_SYSTEM)
    }

    /// Opens and registers its socket.
    async fn connect(&self, node: &Node, capabilities: Value) -> Socket {
        let mut socket = open_agent(node.addr, &self.token).await.expect("a socket");
        let answer = socket.hello(&self.agent_id(), capabilities).await;
        assert_eq!(answer["status"], "ok", "{answer}");
        socket
    }

    /// A script for it that is ready to be sent.
    async fn job(&self, pool: &PgPool) -> i64 {
        let request = json!({
            "target_hostname": "host", "script_type": "bash", "script_name": "test", "script_path": "",
            "script_content": STANDARD.encode("echo hello\n"), "script_encoding": "base64", "environment": {"A": "b"},
            "variables": [], "timeout_seconds": 60, "files": [], "run_mode": "system", "context": {"assembly_guid": "g"},
        });
        sqlx::query_scalar(
            "INSERT INTO activity_history (device_guid, hostname, site_id, request, timeout_seconds, activity_kind)
             VALUES ($1, 'host', $2, $3, 60, 'quick_job') RETURNING id",
        )
        .bind(self.guid)
        .bind(self.site)
        .bind(request)
        .fetch_one(pool)
        .await
        .expect("an activity")
    }
}

async fn new_site(pool: &PgPool, name: &str) -> i64 {
    sqlx::query_scalar("INSERT INTO sites (name, name_key, enrollment_code) VALUES ($1, $1, $1) RETURNING id")
        .bind(name)
        .fetch_one(pool)
        .await
        .expect("a site")
}

fn fingerprint(guid: Uuid) -> String {
    guid.simple().to_string().repeat(2)
}

async fn machine(engine: &TestEngine, site: i64) -> Machine {
    let guid = Uuid::new_v4();
    let fingerprint = fingerprint(guid);
    sqlx::query("INSERT INTO devices (guid, hostname, hostname_key, site_id, fingerprint, public_key) VALUES ($1, 'host', 'host', $2, $3, '')")
        .bind(guid)
        .bind(site)
        .bind(&fingerprint)
        .execute(&engine.database.pool)
        .await
        .expect("a device");
    let token = engine.app.keys.sign_access(guid, &fingerprint, 1, chrono::Utc::now()).expect("a token");
    Machine { guid, site, token }
}

/// An engine whose sockets are open, with a site.
async fn engine() -> (TestEngine, i64) {
    let engine = TestEngine::start().await;
    ready(&engine).await;
    let site = new_site(&engine.database.pool, "site").await;
    (engine, site)
}

/// Waits until a node takes sockets: before, it answers 503.
async fn ready(node: &Node) {
    eventually("the sockets are open", LIMIT, || async {
        (open_agent(node.addr, "a.b.c").await.err() == Some(401)).then_some(())
    })
    .await;
}

async fn row(engine: &TestEngine, activity: i64) -> (String, String, String, i32) {
    sqlx::query_as("SELECT status, delivery, stdout, delivery_count FROM activity_history WHERE id = $1")
        .bind(activity)
        .fetch_one(&engine.database.pool)
        .await
        .expect("the activity")
}

async fn status_becomes(engine: &TestEngine, activity: i64, status: &str) {
    eventually(status, LIMIT, || async { (row(engine, activity).await.0 == status).then_some(()) }).await;
}

fn dedup() -> Value {
    json!({"dedup": true, "cancel": true, "output": true})
}

#[tokio::test]
async fn a_socket_needs_a_token_of_a_device_that_may_connect() {
    let (engine, site) = engine().await;
    let own = machine(&engine, site).await;
    let foreign = borealis_engine::keys::Keys::load_or_create(&engine.state_dir().join("foreign"), None);
    let foreign = match foreign {
        Ok(keys) => keys.sign_access(own.guid, &fingerprint(own.guid), 1, chrono::Utc::now()).expect("a token"),
        Err(_) => own.token.replace('A', "B"),
    };
    for (what, headers) in [
        ("nothing", vec![]),
        ("a wrong word", vec![("authorization", "Bearer nonsense".to_owned())]),
        ("a wrong token", vec![("authorization", "Bearer a.b.c".to_owned())]),
        ("a foreign token", vec![("authorization", format!("Bearer {foreign}"))]),
        ("a cut token", vec![("authorization", format!("Bearer {}", &own.token[..own.token.len() - 4]))]),
        (
            "a cookie from elsewhere",
            vec![("cookie", "borealis_auth=x".to_owned()), ("origin", "https://evil.example".to_owned())],
        ),
    ] {
        let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
        assert_eq!(open(engine.addr, "/socket.io/", &headers).await.err(), Some(401), "{what}");
    }
    assert!(open_agent(engine.addr, &own.token).await.is_ok());
    let path = format!("/_borealis/site-workers/{}/socket.io/", Uuid::new_v4());
    let bearer = format!("Bearer {}", own.token);
    assert!(open(engine.addr, &path, &[("authorization", &bearer)]).await.is_ok(), "the path of a site worker");
    assert_eq!(open(engine.addr, "/_borealis/site-workers/x/socket.io/", &[("authorization", &bearer)]).await.err(), Some(404));

    sqlx::query("UPDATE devices SET status = 'revoked'").execute(&engine.database.pool).await.expect("an update");
    assert_eq!(open_agent(engine.addr, &own.token).await.err(), Some(401));
}

#[tokio::test]
async fn an_agent_cannot_register_as_another() {
    let (engine, site) = engine().await;
    let (own, other) = (machine(&engine, site).await, machine(&engine, site).await);
    let mut socket = open_agent(engine.addr, &own.token).await.expect("a socket");
    let answer = socket.hello(&other.agent_id(), dedup()).await;
    assert_eq!(answer["error"], "agent_id_guid_mismatch", "{answer}");
    socket.closed().await;
    let rows: i64 =
        sqlx::query_scalar("SELECT count(*) FROM device_sockets").fetch_one(&engine.database.pool).await.expect("a count");
    assert_eq!(rows, 0);
}

#[tokio::test]
async fn a_script_is_delivered_signed_and_its_result_applied_once() {
    let (engine, site) = engine().await;
    let own = machine(&engine, site).await;
    let mut socket = own.connect(&engine, dedup()).await;
    let job = own.job(&engine.database.pool).await;
    engine.app.hub.deliver(&[own.guid]).await;

    let sent = socket.event("quick_job_run").await;
    let run: QuickJobRun = serde_json::from_value(sent).expect("a dispatch");
    assert_eq!(run.job_id, job);
    let key = keys::from_spki_base64(&engine.app.keys.script_public_spki_base64()).expect("the engine's key");
    let script = envelope::verify(&run, &key, &own.guid.to_string(), chrono::Utc::now().timestamp()).expect("a good signature");
    assert_eq!(script, b"echo hello\n");
    assert!(run.envelope.is_some());

    assert_eq!(socket.call("quick_job_accepted", json!({"job_id": job})).await["status"], "ok");
    assert_eq!(row(&engine, job).await.1, "accepted");
    let progress = json!({"job_id": job, "status": "Running", "stdout": "hel", "append_output": true});
    assert_eq!(socket.call("quick_job_progress", progress).await["status"], "ok");
    assert_eq!(row(&engine, job).await.0, "Running");
    let result = json!({"job_id": job, "status": "Success", "stdout": "hello\n", "stderr": "", "exit_code": 0});
    assert_eq!(socket.call("quick_job_result", result).await["status"], "ok");
    assert_eq!(row(&engine, job).await, ("Success".into(), "done".into(), "hello\n".into(), 1));

    let late = json!({"job_id": job, "status": "Failed", "stdout": "other", "stderr": ""});
    assert_eq!(socket.call("quick_job_result", late).await["status"], "ignored");
    assert_eq!(row(&engine, job).await.2, "hello\n", "a late duplicate changes nothing");
    let events: Vec<String> = sqlx::query_scalar("SELECT kind FROM activity_events WHERE activity_id = $1")
        .bind(job)
        .fetch_all(&engine.database.pool)
        .await
        .expect("the events");
    assert_eq!(events, ["late_result"]);
}

#[tokio::test]
async fn a_worker_says_that_something_is_to_be_sent_and_not_what() {
    let (engine, site) = engine().await;
    let own = machine(&engine, site).await;
    let mut socket = own.connect(&engine, dedup()).await;
    let base = url::Url::parse(&format!("http://{}", engine.internal_addr)).expect("a URL");
    let worker = ApiClient::new(vec![base], &engine.app.settings.engine_secret_file, Uuid::new_v4()).expect("a client");
    let forged = |job: i64| HostServiceEvent {
        device_guid: own.guid,
        event_name: "quick_job_run",
        payload: json!({
            "job_id": job, "target_hostname": "host", "script_type": "bash", "script_encoding": "base64",
            "script_content": STANDARD.encode("echo forged\n"), "signature": "", "sig_alg": "ed25519",
        }),
    };
    // Nothing is in the tables: nothing is sent.
    let _ = worker.host_service_events(&[forged(1)]).await.expect("an answer");
    let job = own.job(&engine.database.pool).await;
    let _ = worker.host_service_events(&[forged(job)]).await.expect("an answer");
    // The first that comes is the one of the tables.
    let run: QuickJobRun = serde_json::from_value(socket.event("quick_job_run").await).expect("a dispatch");
    assert_eq!((run.job_id, run.script_content.as_str()), (job, &*STANDARD.encode("echo hello\n")));
}

#[tokio::test]
async fn what_was_taken_in_doubt_is_as_if_it_had_not_been() {
    let (engine, site) = engine().await;
    let own = machine(&engine, site).await;
    let pool = &engine.database.pool;
    // At a process that is this test: no other takes what is for its devices.
    let process = Uuid::now_v7();
    sqlx::query("INSERT INTO api_processes (id, last_seen_at) VALUES ($1, now() + interval '1 hour')")
        .bind(process)
        .execute(pool)
        .await
        .expect("a process");
    sqlx::query(
        "INSERT INTO device_sockets (device_guid, service_mode, socket_id, api_process, capabilities, connected_at)
         VALUES ($1, 'system', 'here', $2, '{\"dedup\": true, \"cancel\": true}', now() - interval '1 minute')",
    )
    .bind(own.guid)
    .bind(process)
    .execute(pool)
    .await
    .expect("a socket");
    let take = async |reconnected: bool| {
        let mut tx = pool.begin().await.expect("a transaction");
        let cancels = delivery::take_cancels(&mut tx, process, &[own.guid], reconnected, NO_EPOCH).await.expect("cancels");
        let taken = delivery::take_ready(&mut tx, process, &[own.guid], reconnected, NO_EPOCH).await.expect("what is ready");
        // The commit works, and its answer is lost.
        tx.commit().await.expect("a commit");
        (Doubt::about(&taken, &cancels), taken.deliveries.len(), cancels.len())
    };
    let state = async |job: i64| -> (String, i32, bool) {
        sqlx::query_as("SELECT delivery, delivery_count, cancel_sent_at IS NULL FROM activity_history WHERE id = $1")
            .bind(job)
            .fetch_one(pool)
            .await
            .expect("the activity")
    };
    let job = own.job(pool).await;
    let (doubt, taken, _) = take(false).await;
    assert_eq!((taken, state(job).await), (1, ("sent".into(), 1, true)));
    delivery::undo(pool, &doubt).await.expect("undone");
    assert_eq!(state(job).await, ("ready".into(), 0, true));
    // Taken again in the meantime, by whomever, it stays.
    let _ = take(false).await;
    delivery::undo(pool, &doubt).await.expect("nothing to undo");
    assert_eq!(state(job).await, ("sent".into(), 1, true));

    // What was to be sent again after a reconnection still is, and so is a cancel.
    sqlx::query("UPDATE device_sockets SET connected_at = now()").execute(pool).await.expect("an update");
    let (doubt, taken, _) = take(true).await;
    assert_eq!(taken, 1);
    assert_eq!(take(true).await.1, 0);
    delivery::undo(pool, &doubt).await.expect("undone");
    assert_eq!(take(true).await.1, 1);
    sqlx::query("UPDATE activity_history SET cancel_requested_at = now()").execute(pool).await.expect("an update");
    let (doubt, _, cancels) = take(false).await;
    assert_eq!((cancels, state(job).await.2), (1, false));
    delivery::undo(pool, &doubt).await.expect("undone");
    assert_eq!(take(false).await.2, 1);
}

#[tokio::test]
async fn a_foreign_result_is_ignored() {
    let (engine, site) = engine().await;
    let (own, other) = (machine(&engine, site).await, machine(&engine, site).await);
    let mut socket = own.connect(&engine, dedup()).await;
    let mut stranger = other.connect(&engine, dedup()).await;
    let job = own.job(&engine.database.pool).await;
    engine.app.hub.deliver(&[own.guid]).await;
    let _ = socket.event("quick_job_run").await;
    let claim = json!({"job_id": job, "status": "Success", "stdout": "forged", "stderr": ""});
    let (foreign, absent) = (
        stranger.call("quick_job_result", claim).await,
        stranger.call("quick_job_result", json!({"job_id": job + 1000, "status": "Success"})).await,
    );
    assert_eq!(foreign, absent, "a foreign job looks like none");
    assert_eq!(row(&engine, job).await.0, "Queued");
}

#[tokio::test]
async fn only_an_agent_with_dedup_is_sent_a_script_again() {
    let (engine, site) = engine().await;
    for (capabilities, again) in [(dedup(), true), (json!({"runtime": "go"}), false)] {
        let own = machine(&engine, site).await;
        let job = own.job(&engine.database.pool).await;
        // Ready before the agent is there: delivered when it connects.
        let mut first = own.connect(&engine, capabilities.clone()).await;
        assert_eq!(first.event("quick_job_run").await["job_id"], job);
        drop(first);
        let mut second = own.connect(&engine, capabilities).await;
        if again {
            let sent = second.event("quick_job_run").await;
            assert_eq!((&sent["job_id"], &sent["accepted"]), (&json!(job), &Value::Null));
            assert_eq!(row(&engine, job).await.3, 2);
            // Accepted, it is sent as what it is: an agent that does not know it does not run it.
            assert_eq!(second.call("quick_job_accepted", json!({"job_id": job})).await["status"], "ok");
            drop(second);
            let mut third = own.connect(&engine, dedup()).await;
            let sent = third.event("quick_job_run").await;
            assert_eq!((&sent["job_id"], &sent["accepted"]), (&json!(job), &json!(true)));
        } else {
            assert!(second.silent("quick_job_run", Duration::from_secs(5)).await);
            assert_eq!(row(&engine, job).await.3, 1);
        }
    }
}

#[tokio::test]
async fn a_script_that_an_agent_could_not_take_is_offered_again() {
    let (engine, site) = engine().await;
    let pool = &engine.database.pool;
    let error = async |job: i64| -> Option<String> {
        sqlx::query_scalar("SELECT error FROM activity_history WHERE id = $1")
            .bind(job)
            .fetch_one(pool)
            .await
            .expect("the activity")
    };
    let own = machine(&engine, site).await;
    let mut socket = own.connect(&engine, dedup()).await;
    let job = own.job(pool).await;
    engine.app.hub.deliver(&[own.guid]).await;
    assert_eq!(socket.event("quick_job_run").await["job_id"], job);
    let declined = json!({"job_id": job, "reason": "agent_disk_full"});
    assert_eq!(socket.call("quick_job_declined", declined.clone()).await["status"], "ok");
    assert_eq!(row(&engine, job).await, ("Queued".into(), "ready".into(), String::new(), 0));
    assert_eq!(error(job).await.as_deref(), Some("agent_disk_full"), "operators see why it waits");
    // Not at once, and within a minute.
    engine.app.hub.deliver(&[own.guid]).await;
    assert!(socket.silent("quick_job_run", Duration::from_secs(3)).await);
    let wait: f64 =
        sqlx::query_scalar("SELECT extract(epoch FROM offer_after - now())::float8 FROM activity_history WHERE id = $1")
            .bind(job)
            .fetch_one(pool)
            .await
            .expect("a time");
    assert!(wait < 50.0, "{wait}");
    sqlx::query("UPDATE activity_history SET offer_after = now()").execute(pool).await.expect("an update");
    assert_eq!(socket.event("quick_job_run").await["job_id"], job);
    assert_eq!(socket.call("quick_job_accepted", json!({"job_id": job})).await["status"], "ok");
    assert_eq!((row(&engine, job).await.1.as_str(), error(job).await), ("accepted", None));
    // What it has it cannot give back.
    assert_eq!(socket.call("quick_job_declined", declined).await["status"], "ignored");
    assert_eq!(row(&engine, job).await.1, "accepted");

    // An agent that may have begun with what it was sent has no such word.
    let plain = machine(&engine, site).await;
    let job = plain.job(pool).await;
    let mut socket = plain.connect(&engine, json!({"runtime": "go"})).await;
    assert_eq!(socket.event("quick_job_run").await["job_id"], job);
    let declined = json!({"job_id": job, "reason": "agent_disk_full"});
    assert_eq!(socket.ask("quick_job_declined", declined, Duration::from_secs(1)).await, None);
    assert_eq!(row(&engine, job).await.1, "sent");
}

#[tokio::test]
async fn a_cancel_reaches_the_agent_that_was_sent_the_script() {
    let (engine, site) = engine().await;
    let own = machine(&engine, site).await;
    let mut socket = own.connect(&engine, dedup()).await;
    let job = own.job(&engine.database.pool).await;
    engine.app.hub.deliver(&[own.guid]).await;
    let _ = socket.event("quick_job_run").await;
    sqlx::query("UPDATE activity_history SET cancel_requested_at = now()")
        .execute(&engine.database.pool)
        .await
        .expect("an update");
    engine.app.hub.deliver(&[own.guid]).await;
    assert_eq!(socket.event("quick_job_cancel").await["job_id"], job);
    let result = json!({"job_id": job, "status": "Failed", "stdout": "", "stderr": "", "reason": "cancelled"});
    assert_eq!(socket.call("quick_job_result", result).await["status"], "ok");
    let error: Option<String> = sqlx::query_scalar("SELECT error FROM activity_history WHERE id = $1")
        .bind(job)
        .fetch_one(&engine.database.pool)
        .await
        .expect("the error");
    assert_eq!(error.as_deref(), Some("cancelled_by_operator"));
}

#[tokio::test]
async fn two_api_processes_deliver_to_each_others_sockets() {
    let (engine, site) = engine().await;
    let second = engine.second().await;
    ready(&second).await;
    let own = machine(&engine, site).await;
    let mut socket = own.connect(&second, dedup()).await;
    let job = own.job(&engine.database.pool).await;
    engine.app.hub.deliver(&[own.guid]).await;
    assert_eq!(socket.event("quick_job_run").await["job_id"], job);

    // The newest socket wins, and the old one is closed where it is.
    let _newer = own.connect(&engine, dedup()).await;
    socket.closed().await;
    let process: Uuid = sqlx::query_scalar("SELECT api_process FROM device_sockets WHERE device_guid = $1")
        .bind(own.guid)
        .fetch_one(&engine.database.pool)
        .await
        .expect("one row");
    assert_eq!(process, engine.app.process_id);
    second.stop().await;
}

#[tokio::test]
async fn a_socket_is_closed_when_its_device_may_not_connect_any_more() {
    let (engine, site) = engine().await;
    let elsewhere = new_site(&engine.database.pool, "elsewhere").await;
    for change in [
        "UPDATE devices SET token_version = token_version + 1 WHERE guid = $1".to_owned(),
        "UPDATE devices SET status = 'revoked' WHERE guid = $1".to_owned(),
        "UPDATE devices SET status = 'quarantined' WHERE guid = $1".to_owned(),
        format!("UPDATE devices SET site_id = {elsewhere} WHERE guid = $1"),
        "DELETE FROM devices WHERE guid = $1".to_owned(),
    ] {
        let own = machine(&engine, site).await;
        let socket = own.connect(&engine, dedup()).await;
        sqlx::query(sqlx::AssertSqlSafe(change.clone())).bind(own.guid).execute(&engine.database.pool).await.expect("a change");
        let closed = tokio::time::timeout(Duration::from_secs(8), socket.closed()).await;
        assert!(closed.is_ok(), "not closed in time after: {change}");
    }
    let own = machine(&engine, site).await;
    let socket = own.connect(&engine, dedup()).await;
    engine.app.hub.drop_device(own.guid).await;
    assert!(tokio::time::timeout(Duration::from_secs(2), socket.closed()).await.is_ok(), "dropping is at once");
}

#[tokio::test]
async fn presence_is_true_after_an_api_process_was_killed() {
    let (engine, site) = engine().await;
    let own = machine(&engine, site).await;
    // What a killed process leaves behind.
    let dead = Uuid::new_v4();
    sqlx::query("INSERT INTO api_processes (id, last_seen_at) VALUES ($1, now() - interval '20 s')")
        .bind(dead)
        .execute(&engine.database.pool)
        .await
        .expect("a process");
    sqlx::query("INSERT INTO device_sockets (device_guid, service_mode, socket_id, api_process) VALUES ($1, 'system', 'x', $2)")
        .bind(own.guid)
        .bind(dead)
        .execute(&engine.database.pool)
        .await
        .expect("a socket");
    eventually("the dead process's socket is gone", LIMIT, || async {
        let left: i64 =
            sqlx::query_scalar("SELECT count(*) FROM device_sockets").fetch_one(&engine.database.pool).await.expect("a count");
        (left == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn garbage_closes_one_socket_and_no_other() {
    let (engine, site) = engine().await;
    let own = machine(&engine, site).await;
    let mut good = own.connect(&engine, dedup()).await;
    for garbage in ["quick_job_result", "connect_agent", "no_such_event"] {
        let other = machine(&engine, site).await;
        let mut bad = other.connect(&engine, dedup()).await;
        for payload in [json!(null), json!([]), json!("x"), json!({"job_id": "x"}), json!({"job_id": 9e99})] {
            bad.emit(garbage, payload).await;
        }
    }
    let other = machine(&engine, site).await;
    let mut bad = open_agent(engine.addr, &other.token).await.expect("a socket");
    bad.send(&borealis_protocol::framing::Frame::Noop).await;
    let job = own.job(&engine.database.pool).await;
    engine.app.hub.deliver(&[own.guid]).await;
    assert_eq!(good.event("quick_job_run").await["job_id"], job);
    let huge = json!({"job_id": job, "status": "Success", "stdout": "x".repeat(3 * 1024 * 1024), "stderr": "a\u{0}b"});
    assert_eq!(good.call("quick_job_result", huge).await["status"], "ok");
    status_becomes(&engine, job, "Success").await;
    let stdout = row(&engine, job).await.2;
    assert!(stdout.len() < 1024 * 1024 + 200 && stdout.contains(" bytes of output left out here]"), "{} bytes", stdout.len());
}

#[tokio::test]
async fn operators_hear_of_their_own_sites_only() {
    let engine = TestEngine::start().await;
    ready(&engine).await;
    let second = engine.second().await;
    ready(&second).await;
    let (here, there) = (new_site(&engine.database.pool, "here").await, new_site(&engine.database.pool, "there").await);
    let mut sockets = Vec::new();
    for (operator, node) in [
        (engine.operator(&[here]).await, &engine.node),
        (engine.operator(&[there]).await, &engine.node),
        (engine.admin().await, &second),
    ] {
        let Credential::Bearer(token) = &operator.credential else { panic!("a token") };
        let socket = open(node.addr, "/socket.io/", &[("authorization", &format!("Bearer {token}"))]).await.expect("a socket");
        sockets.push(socket);
    }
    let own = machine(&engine, here).await;
    let mut agent = own.connect(&engine, dedup()).await;
    let job = own.job(&engine.database.pool).await;
    engine.app.hub.deliver(&[own.guid]).await;
    let _ = agent.event("quick_job_run").await;
    let _ = agent.call("quick_job_result", json!({"job_id": job, "status": "Success", "stdout": "", "stderr": ""})).await;

    let mut sockets = sockets.into_iter();
    let (mut insider, mut outsider, mut admin) = (sockets.next().unwrap(), sockets.next().unwrap(), sockets.next().unwrap());
    let seen = insider.event("device_activity_changed").await;
    assert_eq!((&seen["activity_id"], &seen["status"], &seen["source"]), (&json!(job), &json!("Success"), &json!("quick_job")));
    assert_eq!(admin.event("device_activity_changed").await, seen, "through the other API process");
    assert!(outsider.silent("device_activity_changed", Duration::from_secs(2)).await);
    assert!(agent.silent("device_activity_changed", Duration::from_millis(200)).await, "agents hear no operator's event");
    assert!(matches!(outsider.call("operator_presence_sync", json!({"current_page": "x"})).await["status"].as_str(), Some("ok")));

    // One that nobody has worked with for too long is over, and its sockets with it. The administrator's are not concerned.
    let idle = "UPDATE operator_sessions s SET last_seen_at = now() - interval '13 hours' FROM users u WHERE u.id = s.user_id AND u.role = 'User'";
    sqlx::query(idle).execute(&engine.database.pool).await.expect("an update");
    assert!(tokio::time::timeout(Duration::from_secs(8), outsider.closed()).await.is_ok(), "an idle session closes its sockets");
    assert!(matches!(admin.call("operator_presence_sync", json!({"current_page": "x"})).await["status"].as_str(), Some("ok")));
    sqlx::query("DELETE FROM operator_sessions").execute(&engine.database.pool).await.expect("a delete");
    assert!(
        tokio::time::timeout(Duration::from_secs(8), admin.closed()).await.is_ok(),
        "a session that ended closes its sockets"
    );
    let _ = agent::PATIENCE;
    second.stop().await;
}
