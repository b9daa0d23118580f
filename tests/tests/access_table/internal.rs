//! The internal listener, tried as everybody: a worker's signature opens it and nothing else does; what it opens is not
//! outside, and what is outside is not there.

use borealis_api::internal::{Entry, TABLE};
use borealis_tests::actor::Credential;
use serde_json::{Value, json};
use url::Url;

use super::{World, complain, is_error};

/// A valid body for a route of the internal listener; null for none.
fn body(world: &World, route: &str) -> Option<Value> {
    match route {
        "GET /api/internal/job-scheduler/epoch" | "GET /api/internal/job-scheduler/public-base-url" => Some(Value::Null),
        "POST /api/internal/job-scheduler/agent-call" => {
            Some(json!({"device_guid": world.device.guid, "call": "processes.list", "request": {"action": "list"}}))
        }
        "POST /api/internal/job-scheduler/host-service-event" => {
            Some(json!({"device_guid": world.device.guid, "event_name": "quick_job_run"}))
        }
        "POST /api/internal/job-scheduler/workflow/start" => {
            Some(json!({"workflow": "scheduled_run", "key": "a key", "input": {"occurrence_id": 0}}))
        }
        _ => None,
    }
}

async fn workflow_runs(world: &World) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM workflow_runs").fetch_one(world.pool()).await.expect("a count")
}

#[tokio::test]
async fn the_internal_listener_is_for_workers_only() {
    let world = World::new().await;
    let inside = Url::parse(&format!("http://{}", world.engine.internal_addr)).expect("a URL");
    let (workers, others): (Vec<_>, Vec<_>) =
        world.everybody().into_iter().partition(|actor| matches!(actor.credential, Credential::Worker(_)));
    let worker = workers[0];
    let mut faults = Vec::new();
    for Entry { method, path } in TABLE {
        let route = format!("{method} {path}");
        let Some(body) = body(&world, &route) else {
            faults.push(format!("{route} is not tried: add it to body"));
            continue;
        };
        let body = Some(&body).filter(|body| !body.is_null());
        for actor in others.iter().copied().chain([&world.operator.as_browser()]) {
            let reply = actor.at(&inside).call(method, path, body).await;
            if !is_error(&reply, 401, "unauthorized") {
                complain(&mut faults, &route, &actor.name, "401 unauthorized", &reply);
            }
        }
        assert_eq!(workflow_runs(&world).await, 0, "{route}: who was refused started something");
        for actor in world.everybody() {
            let reply = actor.call(method, path, body).await;
            if reply.status != 404 {
                complain(&mut faults, &format!("{route}, outside"), &actor.name, "404", &reply);
            }
        }
        let reply = worker.at(&inside).call(method, path, body).await;
        if reply.status != 200 {
            complain(&mut faults, &route, "worker", "200", &reply);
        }
    }
    assert_eq!(workflow_runs(&world).await, 1);

    let (_, _, table) = borealis_api::app::build(&world.engine.app);
    for entry in &table {
        let route = format!("{} {}, inside", entry.method, entry.path);
        for actor in [&world.admin, &world.device.actor] {
            let reply = actor.at(&inside).call(&entry.method, &entry.path, None).await;
            if !is_error(&reply, 401, "unauthorized") {
                complain(&mut faults, &route, &actor.name, "401 unauthorized", &reply);
            }
        }
        let reply = worker.at(&inside).call(&entry.method, &entry.path.replace(['{', '}'], ""), None).await;
        if reply.status != 404 {
            complain(&mut faults, &route, "worker", "404", &reply);
        }
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}
