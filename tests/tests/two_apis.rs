//! Two API processes on one database, as real processes: sockets on one, requests on the other, and either killed in the
//! middle of jobs. What machines are sent is neither lost nor doubled, and what they answer is recorded once.

use std::{collections::BTreeMap, time::Duration};

use borealis_tests::{
    Actor, House, Proxy, Robot, TestDatabase, actor::Credential, agent::open, eventually, house::SOON, proxy::Line,
};
use serde_json::{Value, json};
use url::Url;

/// Machines of the tests in which a process is killed.
const MACHINES: usize = 12;

async fn house(workers: usize) -> House {
    let database = TestDatabase::start().await;
    let url = database.url.clone();
    let workers: Vec<Url> = std::iter::repeat_n(url.clone(), workers).collect();
    House::open(database, &[url.clone(), url], &workers).await
}

fn token(actor: &Actor) -> String {
    let Credential::Bearer(token) = &actor.credential else { panic!("{} has no token", actor.name) };
    format!("Bearer {token}")
}

async fn quick_run(actor: &Actor, script: &Value, robot: &Robot) -> i64 {
    let body = json!({"hostnames": [robot.device.hostname], "assembly_guid": script});
    let answer = actor.post("/api/scripts/quick_run", body).await.ok();
    answer["results"][0]["job_id"].as_i64().unwrap_or_else(|| panic!("no job id in {answer}"))
}

/// What an activity has become, as `actor` sees it.
async fn becomes(actor: &Actor, activity: i64, status: &str) {
    eventually(&format!("activity {activity} is {status}"), SOON, async || {
        let found = actor.get(&format!("/api/device/activity/job/{activity}")).await.ok();
        (found["status"] == status).then_some(())
    })
    .await;
}

/// Every machine was sent every one of its jobs; those that stayed connected, once.
fn sent_once(robots: &[Robot], jobs: usize) {
    for robot in robots {
        let memory = robot.memory();
        assert_eq!(memory.sent.len(), jobs, "{}: {memory:?}", robot.device.hostname);
        // An agent that says so is sent again what it had not ended when it was cut off; never more often than it came again.
        assert!(memory.sent.values().all(|times| *times <= memory.connections), "{}: {memory:?}", robot.device.hostname);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_at_either_process_reach_the_sockets_of_the_other() {
    let mut house = house(1).await;
    let (one, two) = (house.robot(&[0]).await, house.robot(&[1]).await);
    let admins = [house.admin.clone(), house.admin.at(&house.apis[1].base)];
    let mut watchers = Vec::new();
    for (api, admin) in house.apis.iter().zip(&admins) {
        watchers.push(open(api.addr, "/socket.io/", &[("authorization", &token(admin))]).await.expect("a socket"));
    }
    let script = house.script().await;

    // Quick runs, asked for where the machine is not.
    for (robot, asked, other) in [(&one, &admins[1], &admins[0]), (&two, &admins[0], &admins[1])] {
        let activity = quick_run(asked, &script, robot).await;
        becomes(other, activity, "Success").await;
        assert_eq!(robot.memory().sent, BTreeMap::from([(activity, 1)]));
        // Operators at both processes hear of it.
        for watcher in &mut watchers {
            loop {
                let seen = watcher.event("device_activity_changed").await;
                if (&seen["activity_id"], &seen["status"]) == (&json!(activity), &json!("Success")) {
                    break;
                }
            }
        }
    }

    // A call, asked for at both.
    for (robot, asked) in [(&one, &admins[0]), (&one, &admins[1]), (&two, &admins[0]), (&two, &admins[1])] {
        let listed = asked.get(&format!("/api/device/processes/{}", robot.device.guid)).await.ok();
        assert_eq!(listed["processes"][0]["name"], robot.device.hostname, "{listed}");
    }

    // A job on both, and a cancel of it, each asked for at the other process than the one that made it.
    for robot in [&one, &two] {
        robot.take(Duration::from_secs(120));
    }
    let job = house.run_now(&admins[0], &script, &[&one, &two]).await;
    house.all_are(job, "Running", 2).await;
    let runs = admins[1].get(&format!("/api/scheduled_jobs/{job}/runs")).await.ok();
    for run in runs["runs"].as_array().expect("runs") {
        let _ = admins[1].post(&format!("/api/scheduled_jobs/{job}/runs/{}/cancel", run["id"]), json!({})).await.ok();
    }
    house.all_are(job, "Failed", 2).await;
    for robot in [&one, &two] {
        assert_eq!(robot.memory().cancelled.len(), 1, "{}: told to stop once", robot.device.hostname);
        assert!(robot.memory().sent.values().all(|times| *times == 1), "{:?}", robot.memory());
    }
    house.workflows_end().await;
}

/// Kills API process `victim` while jobs are under way on machines that are all connected to it.
async fn killed(house: &mut House, robots: &[Robot], script: &Value, victim: usize) {
    let survivor = house.admin.at(&house.apis[1 - victim].base);
    for robot in robots {
        robot.take(Duration::from_secs(4));
        assert_eq!(robot.memory().at, Some(house.apis[victim].addr), "all are at the one that dies");
    }
    let all: Vec<&Robot> = robots.iter().collect();
    // One job is running when it dies, one is being dispatched, and one is made right after.
    let running = house.run_now(&survivor, script, &all).await;
    house.all_are(running, "Running", robots.len()).await;
    let dispatching = house.run_now(&survivor, script, &all).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    house.apis[victim].process.take().expect("a process").kill();
    let after = house.run_now(&survivor, script, &all).await;
    for job in [running, dispatching, after] {
        house.all_are(job, "Success", robots.len()).await;
    }
    house.workflows_end().await;
    for robot in robots {
        assert_eq!(robot.memory().at, Some(house.apis[1 - victim].addr), "it came to the other one");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn either_process_may_be_killed_in_the_middle_of_jobs() {
    let mut house = house(2).await;
    let script = house.script().await;
    let mut robots = Vec::new();
    for _ in 0..MACHINES {
        robots.push(house.robot(&[0, 1]).await);
    }
    killed(&mut house, &robots, &script, 0).await;
    sent_once(&robots, 3);
    house.restart(0).await;
    killed(&mut house, &robots, &script, 1).await;
    sent_once(&robots, 6);
    // Each result was recorded once: one activity for each machine and job, one journal entry for each step.
    let activities: i64 =
        sqlx::query_scalar("SELECT count(*) FROM activity_history WHERE status = 'Success' AND stdout = 'ran ' || id || E'\\n'")
            .fetch_one(&house.database.pool)
            .await
            .expect("a count");
    assert_eq!(activities, i64::try_from(6 * MACHINES).expect("a count"));
    let doubled: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM (SELECT 1 FROM workflow_journal WHERE step = 'finish' GROUP BY run_id HAVING count(*) <> 1) AS doubled",
    )
    .fetch_one(&house.database.pool)
    .await
    .expect("a count");
    assert_eq!(doubled, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_process_loses_its_machines_to_the_other_and_comes_back_harmless() {
    let mut house = house(1).await;
    let script = house.script().await;
    let robot = house.robot(&[0]).await;
    let other = house.admin.at(&house.apis[1].base);
    house.apis[0].process.as_ref().expect("a process").stop();
    // What is asked for meanwhile waits for the machine, which hangs on a process that answers nobody.
    let job = house.run_now(&other, &script, &[&robot]).await;
    house.all_are(job, "Pending", 1).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    house.apis[0].process.as_ref().expect("a process").resume();
    house.all_are(job, "Success", 1).await;
    assert!(robot.memory().sent.values().all(|times| *times == 1), "{:?}", robot.memory());
    house.workflows_end().await;
}

/// Within this time work for the agents of a process that is cut off from Postgres goes on through another one.
const ELSEWHERE: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread")]
async fn a_process_cut_off_from_postgres_gives_its_agents_to_the_other() {
    let database = TestDatabase::start().await;
    let (proxy, direct) = (Proxy::start(&database.url).await, database.url.clone());
    let way = proxy.url(&database.url);
    let mut house = House::open(database, &[way, direct.clone()], &[direct]).await;
    let other = house.admin.at(&house.apis[1].base);
    let script = house.script().await;
    let robot = house.robot(&[0, 1]).await;
    assert_eq!(robot.memory().at, Some(house.apis[0].addr));
    // It has seen the other process, so that it knows that there is somewhere to go.
    let _ = quick_run(&other, &script, &robot).await;
    eventually("the first run is there", SOON, async || (robot.memory().sent.len() == 1).then_some(())).await;
    tokio::time::sleep(Duration::from_secs(3)).await;

    // Nothing it asks is answered, and nothing tells it so.
    proxy.set(Line { stalls: true, ..Line::default() });
    let began = tokio::time::Instant::now();
    let activity = quick_run(&other, &script, &robot).await;
    let done = tokio::time::timeout(ELSEWHERE, becomes(&other, activity, "Success")).await;
    assert!(done.is_ok(), "after {:?}: {:?}", began.elapsed(), robot.memory());
    assert_eq!(robot.memory().at, Some(house.apis[1].addr));
    // A load balancer reads that here, and an agent that comes all the same is sent on at once.
    assert_eq!(house.admin.get("/ready").await.status, 503);
    let Credential::Bearer(token) = &robot.device.actor.credential else { panic!("a device has a token") };
    assert!(borealis_tests::agent::try_open_agent(house.apis[0].addr, token).await.is_err());

    proxy.come_back();
    eventually("it is ready again", SOON, async || (house.admin.get("/ready").await.status == 200).then_some(())).await;
    let back = house.robot(&[0]).await;
    let activity = quick_run(&other, &script, &back).await;
    becomes(&other, activity, "Success").await;
    assert!(robot.memory().sent.values().all(|times| *times == 1), "{:?}", robot.memory());
}
