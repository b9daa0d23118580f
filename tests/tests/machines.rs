//! An identity belongs to its machine: a copy of it is held until an operator decides, so that nothing runs twice, and a machine that
//! was restored from a snapshot of itself goes on.

use std::time::Duration;

use borealis_tests::{
    Device, Reply, TestEngine,
    actor::{Actor, Credential, Enrollment, new_key},
    agent::{Socket, try_open_agent},
    eventually,
};
use serde_json::{Value, json};
use uuid::Uuid;

const LIMIT: Duration = Duration::from_secs(10);

/// What an agent says of itself and its machine.
#[derive(Clone)]
struct Bearer {
    machine_id: String,
    instance: Uuid,
}

impl Bearer {
    fn on(machine: u128) -> Self {
        Self { machine_id: borealis_protocol::machine_id(&format!("{machine:032x}")), instance: Uuid::new_v4() }
    }

    fn said(&self) -> Value {
        json!({"machine_id": self.machine_id, "instance": self.instance})
    }
}

/// Connects as the device, with these further members of `connect_agent`; the socket and the engine's answer.
async fn connect(engine: &TestEngine, device: &Device, token: &str, said: Value) -> (Socket, Value) {
    let mut hello = json!({
        "agent_id": borealis_protocol::agent_id(&device.hostname, &device.guid, borealis_protocol::CONTEXT_SYSTEM),
        "service_mode": "system", "hostname": "copy", "capabilities": {"dedup": true, "cancel": true},
    });
    hello.as_object_mut().expect("an object").extend(said.as_object().expect("an object").clone());
    // Sockets of a device that was told to leave are cut for a moment.
    eventually("the engine answers", LIMIT, || async {
        let mut socket = try_open_agent(engine.addr, token).await.ok()?;
        let answer = socket.ask("connect_agent", hello.clone(), LIMIT).await?;
        Some((socket, answer))
    })
    .await
}

fn token_of(device: &Device) -> &str {
    let Credential::Bearer(token) = &device.actor.credential else { panic!("no token") };
    token
}

async fn refused(engine: &TestEngine, device: &Device, bearer: &Bearer, code: &str) -> Value {
    let (socket, answer) = connect(engine, device, token_of(device), bearer.said()).await;
    assert_eq!((&answer["error"], &answer["status_code"]), (&json!(code), &json!(409)), "{answer}");
    socket.closed().await;
    answer
}

async fn refresh(engine: &TestEngine, device: &Device, token: &str, bearer: &Bearer) -> Reply {
    let mut body = bearer.said();
    body["guid"] = json!(device.guid);
    body["refresh_token"] = json!(token);
    body["capabilities"] = json!({"rotates": true});
    engine.anonymous().post("/api/agent/token/refresh", body).await
}

/// A refresh that is answered: the next refresh token.
async fn next_token(engine: &TestEngine, device: &Device, token: &str, bearer: &Bearer) -> String {
    let renewed = refresh(engine, device, token, bearer).await.ok();
    renewed["refresh_token"].as_str().expect("a token").to_owned()
}

async fn pending(operator: &Actor) -> Vec<Value> {
    let shown = operator.get("/api/admin/device-approvals?status=pending").await.ok();
    shown["approvals"].as_array().expect("approvals").clone()
}

async fn decide(operator: &Actor, approval: &Value, decision: &str) {
    let id = approval["id"].as_str().expect("an id");
    let _ = operator.post(&format!("/api/admin/device-approvals/{id}/{decision}"), json!({})).await.ok();
}

async fn audited(engine: &TestEngine, action: &str) -> usize {
    let audited = engine.admin().await.get(&format!("/api/audit?action={action}")).await.ok();
    audited["events"].as_array().map_or(0, Vec::len)
}

/// Lets time pass in the columns that say when a device, its tokens and a contest were last heard of.
async fn later(engine: &TestEngine, seconds: f64) {
    for (table, column) in [("devices", "last_seen"), ("refresh_tokens", "last_used_at"), ("device_sockets", "contested_at")] {
        sqlx::query(sqlx::AssertSqlSafe(format!(
            "UPDATE {table} SET {column} = {column} - make_interval(secs => $1) WHERE {column} IS NOT NULL"
        )))
        .bind(seconds)
        .execute(&engine.database.pool)
        .await
        .expect("an update");
    }
}

#[tokio::test]
async fn a_copy_on_another_machine_is_held_until_an_operator_decides() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let (other_site, _) = engine.site("south").await;
    let (operator, stranger) = (engine.operator(&[site]).await, engine.operator(&[other_site]).await);
    let device = engine.device(site).await;
    let (own, copy) = (Bearer::on(1), Bearer::on(2));
    let (mut first, answer) = connect(&engine, &device, token_of(&device), own.said()).await;
    assert_eq!(answer["status"], "ok", "{answer}");

    for _ in 0..2 {
        let answer = refused(&engine, &device, &copy, "identity_held").await;
        assert!(answer["retry_after_ms"].as_u64().is_some_and(|ms| ms >= 60_000), "{answer}");
    }
    // Started again, it is the same machine; one that says nothing any more is none.
    let _ = refused(&engine, &device, &Bearer { instance: Uuid::new_v4(), ..copy.clone() }, "identity_held").await;
    let _ = refresh(&engine, &device, &device.refresh_token, &copy).await.error(409, "identity_held");
    assert!(first.silent("disconnect", Duration::from_millis(300)).await, "the machine it belongs to keeps its socket");
    let next = next_token(&engine, &device, &device.refresh_token, &own).await;
    let newest = next_token(&engine, &device, &next, &own).await;

    let approvals = pending(&operator).await;
    assert_eq!(approvals.len(), 1, "{approvals:?}");
    assert_eq!((&approvals[0]["kind"], &approvals[0]["guid"]), (&json!("identity"), &json!(device.guid.to_uppercase())));
    let facts = &approvals[0]["facts"];
    assert_eq!((&facts["held"]["machine_id"], &facts["held"]["hostname"]), (&json!(copy.machine_id), &json!("copy")), "{facts}");
    assert_eq!(
        (&facts["current"]["machine_id"], &facts["current"]["hostname"]),
        (&json!(own.machine_id), &json!(device.hostname))
    );
    assert_eq!(audited(&engine, "device.identity_held").await, 1);
    assert!(pending(&stranger).await.is_empty());
    let id = approvals[0]["id"].as_str().expect("an id");
    let _ = stranger.post(&format!("/api/admin/device-approvals/{id}/approve"), json!({})).await.expect(404);

    // Moved to the copy: the machine it belonged to is held from then on, and can be given it back.
    decide(&operator, &approvals[0], "approve").await;
    first.closed().await;
    let (second, answer) = connect(&engine, &device, token_of(&device), copy.said()).await;
    assert_eq!(answer["status"], "ok", "{answer}");
    let _ = refused(&engine, &device, &own, "identity_held").await;
    let _ = refresh(&engine, &device, &newest, &own).await.error(409, "identity_held");
    let _ = refresh(&engine, &device, &device.refresh_token, &copy).await.error(409, "identity_contested");
    later(&engine, 91.0).await;
    let _ = next_token(&engine, &device, &device.refresh_token, &copy).await;
    let approvals = pending(&operator).await;
    assert_eq!(approvals.len(), 1, "{approvals:?}");
    decide(&operator, &approvals[0], "approve").await;
    second.closed().await;
    let (_third, answer) = connect(&engine, &device, token_of(&device), own.said()).await;
    assert_eq!(answer["status"], "ok", "{answer}");
    let _ = refused(&engine, &device, &copy, "identity_held").await;

    // Denied, it stays held, and nobody is asked again.
    decide(&operator, &pending(&operator).await[0], "deny").await;
    let _ = refused(&engine, &device, &copy, "identity_held").await;
    assert!(pending(&operator).await.is_empty());
}

#[tokio::test]
async fn of_two_with_one_machine_id_that_are_there_at_once_the_second_is_held() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let (operator, device) = (engine.operator(&[site]).await, engine.device(site).await);
    let own = Bearer::on(3);
    let copy = Bearer::on(3);
    let (first, answer) = connect(&engine, &device, token_of(&device), own.said()).await;
    assert_eq!(answer["status"], "ok", "{answer}");

    let _ = refused(&engine, &device, &copy, "identity_contested").await;
    let _ = refresh(&engine, &device, &device.refresh_token, &copy).await.error(409, "identity_contested");
    assert!(pending(&operator).await.is_empty(), "a machine that was cut off and started again looks like this for a while");
    later(&engine, 61.0).await;
    let _ = refresh(&engine, &device, &device.refresh_token, &copy).await.error(409, "identity_held");
    let _ = refused(&engine, &device, &copy, "identity_held").await;
    assert_eq!(audited(&engine, "device.identity_held").await, 1);

    // The same agent with a new connection takes the place of its own; the other one is not let in when it is away for a moment.
    let (second, answer) = connect(&engine, &device, token_of(&device), own.said()).await;
    assert_eq!(answer["status"], "ok", "{answer}");
    first.closed().await;
    drop(second);
    eventually("the socket is gone", LIMIT, || async {
        let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM device_sockets").fetch_one(&engine.database.pool).await.ok()?;
        (rows == 0).then_some(())
    })
    .await;
    let _ = refused(&engine, &device, &copy, "identity_held").await;

    // An operator chooses the copy.
    let (first, _) = connect(&engine, &device, token_of(&device), own.said()).await;
    let approvals = pending(&operator).await;
    assert_eq!(approvals.len(), 1, "{approvals:?}");
    assert_eq!(approvals[0]["facts"]["held"]["instance"], json!(copy.instance));
    decide(&operator, &approvals[0], "approve").await;
    first.closed().await;
    let _ = refused(&engine, &device, &own, "identity_held").await;
    let renewed = refresh(&engine, &device, &device.refresh_token, &copy).await.ok();
    let (_second, answer) = connect(&engine, &device, renewed["access_token"].as_str().expect("a token"), copy.said()).await;
    assert_eq!(answer["status"], "ok", "{answer}");
    let _ = refused(&engine, &device, &own, "identity_held").await;
    let _ = refresh(&engine, &device, &device.refresh_token, &own).await.error(409, "identity_held");
}

#[tokio::test]
async fn a_machine_that_was_restored_from_a_snapshot_goes_on() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let device = engine.device(site).await;
    let own = Bearer::on(1);
    let mut tokens = vec![device.refresh_token.clone()];
    for _ in 0..3 {
        tokens.push(next_token(&engine, &device, tokens.last().expect("a token"), &own).await);
    }
    // Restored, it is another process. Its later self was heard a moment ago, so that it may be a copy.
    let restored = Bearer::on(1);
    let _ = refresh(&engine, &device, &tokens[1], &restored).await.error(409, "identity_contested");
    later(&engine, 91.0).await;
    let again = next_token(&engine, &device, &tokens[1], &restored).await;
    let _ = next_token(&engine, &device, &again, &restored).await;
    assert_eq!(audited(&engine, "device.identity_restored").await, 1);
    assert_eq!(audited(&engine, "device.identity_held").await, 0);

    // If there is a later self, it is the second of two from now on.
    let (_socket, answer) = connect(&engine, &device, token_of(&device), restored.said()).await;
    assert_eq!(answer["status"], "ok", "{answer}");
    let _ = refresh(&engine, &device, &tokens[3], &own).await.error(409, "identity_contested");
    later(&engine, 61.0).await;
    let _ = refresh(&engine, &device, &tokens[3], &own).await.error(409, "identity_held");
    assert_eq!(audited(&engine, "device.identity_held").await, 1);

    // Someone who has an old token and does not say the machine is held as well, and ends nothing.
    let nameless = Bearer { machine_id: String::new(), ..own.clone() };
    let _ = refresh(&engine, &device, &tokens[1], &nameless).await.error(409, "identity_held");
}

#[tokio::test]
async fn a_machine_that_was_installed_again_and_is_approved_is_the_device() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let device = engine.device(site).await;
    let (own, copy) = (Bearer::on(1), Bearer::on(2));
    let newest = next_token(&engine, &device, &device.refresh_token, &own).await;
    let _ = refused(&engine, &device, &copy, "identity_held").await;
    let operator = engine.operator(&[site]).await;
    assert_eq!(pending(&operator).await.len(), 1);

    let code = engine.enrollment_code(site).await;
    let request = Enrollment::request(&engine.anonymous(), &device.hostname, &code, new_key()).await;
    let approval = engine.approval(request.reference()).await;
    let overwrite = json!({"conflict_resolution": "overwrite"});
    let _ = operator.post(&format!("/api/admin/device-approvals/{approval}/approve"), overwrite).await.ok();
    let again = request.finish(site).await;
    assert_eq!(again.guid, device.guid);
    assert!(pending(&operator).await.is_empty(), "what was shown of other machines is over");
    let reinstalled = Bearer::on(3);
    let (_socket, answer) = connect(&engine, &again, token_of(&again), reinstalled.said()).await;
    assert_eq!(answer["status"], "ok", "{answer}");

    // Tokens from before are worth nothing, on whatever machine, and show nobody.
    let _ = refresh(&engine, &device, &newest, &own).await.error(401, "refresh_token_revoked");
    assert!(pending(&operator).await.is_empty());
}

#[tokio::test]
async fn a_hostile_agent_shows_a_bounded_number_of_machines_to_the_operators_of_its_site() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let (elsewhere, _) = engine.site("south").await;
    let (operator, device) = (engine.operator(&[site]).await, engine.device(site).await);
    let _ = next_token(&engine, &device, &device.refresh_token, &Bearer::on(1)).await;
    for machine in 2..14 {
        let _ = refused(&engine, &device, &Bearer::on(machine), "identity_held").await;
    }
    let shown = pending(&operator).await;
    assert_eq!((shown.len(), audited(&engine, "device.identity_held").await), (8, 8));

    // What an operator of the site was shown says nothing about the device once it is another site's.
    sqlx::query("UPDATE devices SET site_id = $1").bind(elsewhere).execute(&engine.database.pool).await.expect("an update");
    let id = shown[0]["id"].as_str().expect("an id");
    let approve = format!("/api/admin/device-approvals/{id}/approve");
    let _ = operator.post(&approve, json!({})).await.error(409, "device_changed");
    let _ = refused(&engine, &device, &Bearer::on(2), "identity_held").await;
    let there = engine.operator(&[elsewhere]).await;
    assert_eq!((pending(&there).await.len(), pending(&operator).await.len()), (1, 7));
}

#[tokio::test]
async fn agents_that_do_not_say_who_they_are_and_displace_each_other_are_reported() {
    let engine = TestEngine::start().await;
    let (site, _) = engine.site("north").await;
    let device = engine.device(site).await;
    let mut sockets = Vec::new();
    for count in 0..8 {
        let (socket, answer) = connect(&engine, &device, token_of(&device), json!({})).await;
        assert_eq!(answer["status"], "ok", "{answer}");
        sockets.push(socket);
        if count == 4 {
            assert_eq!(audited(&engine, "device.identity_flapping").await, 0);
        }
    }
    eventually("the audit is told", LIMIT, || async { (audited(&engine, "device.identity_flapping").await == 1).then_some(()) })
        .await;
}
