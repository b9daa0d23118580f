//! Sockets, tried as everybody: who gets one, what each may say on it, and who is told what. A new event has no line in
//! [`said_by_agent`] or [`said_by_operator`], and so does not compile.

use std::{collections::BTreeSet, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use borealis_api::sockets::events::{FromAgent, FromOperator, ToOperator};
use borealis_tests::{
    Actor, Device,
    actor::Credential,
    agent::{PATIENCE, Socket, open, open_agent},
    eventually,
};
use futures::future::join_all;
use serde_json::{Value, json};
use uuid::Uuid;

use super::World;

/// How long somebody is listened to who should hear nothing.
const SILENCE: Duration = Duration::from_millis(700);

/// What an agent says with an event, of itself or of its job.
fn said_by_agent(event: FromAgent, agent_id: &str, job: i64) -> Value {
    match event {
        FromAgent::Connect => {
            json!({"agent_id": agent_id, "service_mode": "system", "hostname": "host", "capabilities": {"dedup": true}})
        }
        FromAgent::Declined => json!({"job_id": job, "reason": "agent_disk_full"}),
        FromAgent::Accepted => json!({"job_id": job}),
        FromAgent::Progress => json!({"job_id": job, "status": "Running", "stdout": "so far", "append_output": true}),
        FromAgent::Result => json!({"job_id": job, "status": "Success", "stdout": "all", "stderr": "", "exit_code": 0}),
    }
}

/// What a person says with an event.
fn said_by_operator(event: FromOperator) -> Value {
    match event {
        FromOperator::PresenceSync => json!({"current_page": "/devices"}),
        FromOperator::PresenceClear => json!({}),
    }
}

fn agent_id(device: &Device) -> String {
    borealis_protocol::agent_id(&device.hostname, &device.guid, borealis_protocol::CONTEXT_SYSTEM)
}

impl World {
    /// Waits until the engine takes sockets: before, it answers 503.
    async fn ready(&self) {
        eventually("the sockets are open", PATIENCE, || async {
            (open_agent(self.engine.addr, "a.b.c").await.err() == Some(401)).then_some(())
        })
        .await;
    }

    /// Opens a socket as this one, a browser from a page of ours.
    async fn open(&self, actor: &Actor, path: &str) -> Result<Socket, u16> {
        let mut proof = actor.proof("GET", &format!("{path}?EIO=4&transport=websocket"), &[]);
        if matches!(actor.credential, Credential::Cookie(_)) {
            proof.push(("origin", self.engine.app.settings.public_base_url.origin().ascii_serialization()));
        }
        let headers: Vec<(&str, &str)> = proof.iter().map(|(name, value)| (*name, value.as_str())).collect();
        open(self.engine.addr, path, &headers).await
    }

    async fn opened(&self, actor: &Actor) -> Socket {
        self.open(actor, "/socket.io/").await.unwrap_or_else(|status| panic!("{} gets no socket: {status}", actor.name))
    }

    /// Everybody who is a person.
    fn people(&self) -> Vec<&Actor> {
        [&self.operator, &self.admin].into_iter().chain(&self.strangers).collect()
    }

    /// A script for the device of site A, ready to be sent.
    async fn script(&self) -> i64 {
        let request = json!({
            "target_hostname": "host", "script_type": "bash", "script_name": "test", "script_path": "",
            "script_content": STANDARD.encode("echo hello\n"), "script_encoding": "base64", "environment": {},
            "variables": [], "timeout_seconds": 60, "files": [], "run_mode": "system", "context": {"assembly_guid": "g"},
        });
        sqlx::query_scalar(
            "INSERT INTO activity_history (device_guid, hostname, site_id, request, timeout_seconds, activity_kind)
             VALUES ($1, $2, $3, $4, 60, 'quick_job') RETURNING id",
        )
        .bind(Uuid::parse_str(&self.device.guid).expect("a GUID"))
        .bind(&self.device.hostname)
        .bind(self.site)
        .bind(request)
        .fetch_one(self.pool())
        .await
        .expect("an activity")
    }

    /// What a stranger's word must not change: the script, and whether its device is connected.
    async fn state(&self, script: i64) -> (String, String, String, i64) {
        sqlx::query_as(
            "SELECT status, delivery, stdout, (SELECT count(*) FROM device_sockets AS s WHERE s.device_guid = a.device_guid)
             FROM activity_history AS a WHERE id = $1",
        )
        .bind(script)
        .fetch_one(self.pool())
        .await
        .expect("an activity")
    }
}

#[tokio::test]
async fn devices_and_signed_in_people_get_a_socket_and_nobody_else() {
    let world = World::new().await;
    world.ready().await;
    let through_worker = format!("/_borealis/site-workers/{}/socket.io/", Uuid::new_v4());
    for path in ["/socket.io/", &through_worker] {
        for actor in &world.unknown {
            assert_eq!(world.open(actor, path).await.err(), Some(401), "{} at {path}", actor.name);
        }
        let browser = world.operator.as_browser();
        for actor in world.people().into_iter().chain([&browser, &world.device.actor, &world.other_device.actor]) {
            assert_eq!(world.open(actor, path).await.err(), None, "{} at {path}", actor.name);
        }
    }
}

#[tokio::test]
async fn an_event_is_taken_from_whom_it_is_for_and_ignored_from_others() {
    let world = World::new().await;
    world.ready().await;
    let script = world.script().await;
    let (itself, other) = (agent_id(&world.device), agent_id(&world.other_device));
    let mut people = Vec::new();
    for actor in world.people() {
        people.push((actor.name.clone(), world.opened(actor).await));
    }
    let mut device = world.opened(&world.device).await;

    for event in FromAgent::ALL.iter().copied() {
        let before = world.state(script).await;
        // People have no such events, whatever they may see.
        let said = said_by_agent(event, &itself, script);
        let answers = people.iter_mut().map(|(name, socket)| {
            let said = said.clone();
            async move { (name.clone(), socket.ask(event.name(), said, SILENCE).await) }
        });
        for (name, answer) in join_all(answers).await {
            assert_eq!(answer, None, "{event:?} as {name}");
        }
        // Another device speaks for itself only; a foreign job looks like none.
        let mut stranger = world.opened(&world.other_device).await;
        if event == FromAgent::Connect {
            let answer = stranger.call(event.name(), said.clone()).await;
            assert_eq!(answer["error"], "agent_id_guid_mismatch", "{event:?} as another device: {answer}");
            stranger.closed().await;
        } else {
            let hello = said_by_agent(FromAgent::Connect, &other, script);
            assert_eq!(stranger.call(FromAgent::Connect.name(), hello).await["status"], "ok");
            let foreign = stranger.call(event.name(), said.clone()).await;
            let absent = stranger.call(event.name(), said_by_agent(event, &other, script + 1000)).await;
            assert_eq!(foreign, absent, "{event:?} as another device");
        }
        assert_eq!(world.state(script).await, before, "{event:?} from somebody else changed something");

        let answer = device.call(event.name(), said).await;
        assert_eq!(answer["status"], "ok", "{event:?} as the device: {answer}");
        if event == FromAgent::Connect {
            assert_eq!(device.event("quick_job_run").await["job_id"], script);
        }
        assert_ne!(world.state(script).await, before, "{event:?} from the device changed nothing");
    }

    for event in FromOperator::ALL.iter().copied() {
        let mut stranger = world.opened(&world.other_device).await;
        let said = said_by_operator(event);
        let (one, two) =
            tokio::join!(device.ask(event.name(), said.clone(), SILENCE), stranger.ask(event.name(), said.clone(), SILENCE));
        assert_eq!((one, two), (None, None), "{event:?} as a device");
        for (name, socket) in &mut people {
            assert_eq!(socket.call(event.name(), said.clone()).await, json!({"status": "ok"}), "{event:?} as {name}");
        }
    }
}

/// What somebody was told by the test, and everything else they heard.
#[derive(Default)]
struct Heard {
    told: BTreeSet<(String, String)>,
    besides: Vec<(String, Value)>,
}

impl Heard {
    /// Listens for `time`, or until `wanted` things were told.
    async fn listen(&mut self, socket: &mut Socket, wanted: usize, time: Duration) {
        let listening = async {
            while self.told.len() < wanted {
                let Some((name, payload)) = socket.any_event().await else { return };
                match payload["told"].as_str() {
                    Some(place) => {
                        self.told.insert((name, place.to_owned()));
                    }
                    None => self.besides.push((name, payload)),
                }
            }
        };
        let _ = tokio::time::timeout(time, listening).await;
    }
}

#[tokio::test]
async fn people_are_told_of_their_own_sites_and_devices_of_none() {
    let world = World::new().await;
    world.ready().await;
    let other_site = world.other_device.site_id;
    let [neighbour, outsider] = world.strangers.as_slice() else { panic!("two strangers") };
    // Who hears of what: site A, site B, neither.
    let mut listeners = Vec::new();
    for (actor, places) in [
        (&world.operator, vec!["A"]),
        (neighbour, vec!["B"]),
        (outsider, vec![]),
        (&world.admin, vec!["A", "B", "none"]),
        (&world.device.actor, vec![]),
        (&world.other_device.actor, vec![]),
    ] {
        let mut socket = world.opened(actor).await;
        let (event, said) = match [&world.device, &world.other_device].into_iter().find(|device| device.name == actor.name) {
            Some(device) => (FromAgent::Connect.name(), said_by_agent(FromAgent::Connect, &agent_id(device), 0)),
            None => (FromOperator::PresenceSync.name(), said_by_operator(FromOperator::PresenceSync)),
        };
        // Who is answered is in the rooms that are theirs.
        assert_eq!(socket.call(event, said).await["status"], "ok", "{}", actor.name);
        let expected: BTreeSet<(String, String)> = ToOperator::ALL
            .iter()
            .flat_map(|event| places.iter().map(|place| (event.name().to_owned(), (*place).to_owned())))
            .collect();
        listeners.push((actor.name.clone(), socket, expected));
    }
    for event in ToOperator::ALL.iter().copied() {
        for (site, place) in [(Some(world.site), "A"), (Some(other_site), "B"), (None, "none")] {
            world.engine.app.hub.to_site(site, event, json!({"told": place})).await;
        }
    }
    // And what the engine says by itself of site A.
    let _ = world.approval().await;
    let _ = world.device.post("/api/agent/status", json!({"boot_id": "b", "phase": "starting", "status": "ok"})).await.ok();

    let heard = join_all(listeners.iter_mut().map(|(_, socket, expected)| async move {
        let mut heard = Heard::default();
        heard.listen(socket, expected.len(), PATIENCE).await;
        heard
    }))
    .await;
    // Whoever should have heard has; now for those who should not.
    let heard = join_all(listeners.iter_mut().zip(heard).map(|((_, socket, _), mut heard)| async move {
        heard.listen(socket, usize::MAX, SILENCE).await;
        heard
    }))
    .await;
    for ((name, _, expected), heard) in listeners.iter().zip(&heard) {
        assert_eq!(heard.told, *expected, "what {name} was told");
        let of_site_a =
            heard.besides.iter().any(|(_, payload)| payload["site_id"] == world.site || payload["guid"] == world.device.guid);
        let may = expected.iter().any(|(_, place)| place == "A");
        assert_eq!(of_site_a, may, "what {name} heard besides: {:?}", heard.besides);
    }
    for name in [&world.device.name, &world.other_device.name] {
        let at = listeners.iter().position(|(listener, ..)| listener == name).expect("a device");
        assert!(heard[at].besides.is_empty(), "{name} heard {:?}", heard[at].besides);
    }
}
