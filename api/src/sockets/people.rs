//! The sockets of operators: rooms by what they may see, and who is where.

use std::sync::{Arc, Mutex, PoisonError};

use chrono::Utc;
use serde_json::{Value, json};
use socketioxide::extract::{AckSender, SocketRef};

use super::{
    Adapter, Running,
    events::{FromOperator, ToOperator},
    registry::{Person, View},
    said::Said,
    upgrade::Peer,
};

/// The room of administrators, who see every site.
pub const ADMINS: &str = "admins";
/// The longest page name, in characters.
const PAGE_CHARS: usize = 160;

/// The room of those who may see a site.
pub fn site_room(site: i64) -> String {
    format!("site:{site}")
}

/// An operator's socket has entered the namespace.
pub fn entered(running: &Arc<Running>, socket: SocketRef<Adapter>) {
    let Some(Peer::Person(person)) = socket.req_parts().extensions.get::<Peer>().cloned() else { return };
    socket.join(format!("op:{}", person.user_id));
    place(&socket, &person.view());
    running.registry.enter_person(person.clone(), socket.clone());

    let page: Arc<Mutex<Option<String>>> = Arc::default();
    for event in FromOperator::ALL {
        let (running, page) = (running.clone(), page.clone());
        socket.on(event.name(), move |Said(said), ack: AckSender<Adapter>| {
            let now = match event {
                FromOperator::PresenceSync => Some(current_page(&said.unwrap_or_default())),
                FromOperator::PresenceClear => None,
            };
            let before = std::mem::replace(&mut *page.lock().unwrap_or_else(PoisonError::into_inner), now.clone());
            let _ = ack.send(&json!({"status": "ok"}));
            if before != now {
                changed(&running);
            }
            std::future::ready(())
        });
    }
    let running = running.clone();
    socket.on_disconnect(move |socket: SocketRef<Adapter>| {
        person.cut.cancel();
        running.registry.remove_person(&socket.id.to_string());
        if page.lock().unwrap_or_else(PoisonError::into_inner).take().is_some() {
            changed(&running);
        }
        std::future::ready(())
    });
}

fn current_page(said: &Value) -> String {
    said.get("current_page").and_then(Value::as_str).unwrap_or_default().chars().take(PAGE_CHARS).collect()
}

fn changed(running: &Running) {
    running.tell_site(None, ToOperator::OperatorPresence, json!({"changed_at": Utc::now().timestamp()}));
}

/// Puts a socket into the rooms of what its operator may see, and out of all other site rooms.
fn place(socket: &SocketRef<Adapter>, view: &View) {
    let stale: Vec<String> = socket
        .rooms()
        .into_iter()
        .filter(|room| room.starts_with("site:") || *room == ADMINS)
        .map(|room| room.to_string())
        .collect();
    socket.leave(stale);
    if view.admin {
        socket.join(ADMINS);
    } else {
        socket.join(view.sites.iter().copied().map(site_room).collect::<Vec<_>>());
    }
}

/// What an operator may see has changed.
pub fn replace(person: &Person, socket: &SocketRef<Adapter>, view: View) {
    if person.set_view(view.clone()) {
        place(socket, &view);
    }
}
