//! The messages the Borealis agent and the engine exchange, and the small wire layers under them.
//!
//! * [`rest`]: bodies of the `/api/agent/*` routes.
//! * [`events`]: Socket.IO events between agent and engine.
//! * [`calls`]: events of the engine that an agent answers.
//! * [`envelope`]: how a script is signed and how an agent checks it.
//! * [`keys`]: Ed25519 keys as they travel, fingerprints and the enrollment proof.
//! * [`framing`]: Engine.IO 4 and Socket.IO packets as text frames.
//! * [`output`]: what is kept of a script's output.
//!
//! Everything here is pure: no I/O, no clock, no randomness.

pub mod calls;
pub mod canonical;
pub mod envelope;
pub mod events;
pub mod framing;
pub mod keys;
mod lenient;
pub mod output;
pub mod rest;
pub mod succession;

/// Header naming the context an agent process speaks for.
pub const HEADER_AGENT_CONTEXT: &str = "X-Borealis-Agent-Context";

/// Context of the agent's system service, as it stands in the header and at the end of an agent id.
pub const CONTEXT_SYSTEM: &str = "SYSTEM";

/// Agent id of a device: `<HOSTNAME>_<GUID>_<CONTEXT>`, hostname upper-case with spaces as dashes.
#[must_use]
pub fn agent_id(hostname: &str, guid: &str, context: &str) -> String {
    let host = hostname.trim().to_uppercase().replace(' ', "-");
    let host = if host.is_empty() { "UNKNOWN-HOST" } else { &host };
    format!("{host}_{}_{context}", normalise_guid(guid))
}

/// The engine refuses an agent: another machine has the identity of its device, and an operator has to decide.
pub const IDENTITY_HELD: &str = "identity_held";
/// The engine refuses an agent: another agent with its identity is connected, or was a moment ago. It may try again.
pub const IDENTITY_CONTESTED: &str = "identity_contested";

/// What an agent says of its machine, so that a copy of its state on another machine is noticed: a hash of the id in `text`, as the id
/// itself is not to be sent. `text` is that of `/etc/machine-id`: 32 hexadecimal digits. Anything else is no id (a system that boots for
/// the first time has `uninitialized`), and the answer is empty.
#[must_use]
pub fn machine_id(text: &str) -> String {
    let id = text.trim().to_ascii_lowercase();
    let is_id = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_id { canonical::sha256_hex(format!("borealis machine {id}").as_bytes()) } else { String::new() }
}

/// A GUID as it is stored and compared: upper-case, without braces and surrounding space.
#[must_use]
pub fn normalise_guid(guid: &str) -> String {
    guid.trim().trim_start_matches('{').trim_end_matches('}').to_uppercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_ids_follow_the_contract() {
        let id = agent_id("web 01.example", "{0d2f7b1a-0000-4000-8000-00000000abcd}", CONTEXT_SYSTEM);
        assert_eq!(id, "WEB-01.EXAMPLE_0D2F7B1A-0000-4000-8000-00000000ABCD_SYSTEM");
        assert_eq!(agent_id("  ", "A", CONTEXT_SYSTEM), "UNKNOWN-HOST_A_SYSTEM");
    }

    #[test]
    fn only_a_machine_id_is_one() {
        let hash = machine_id("0123456789abcdef0123456789abcdef\n");
        assert_eq!((hash.len(), &hash), (64, &machine_id(" 0123456789ABCDEF0123456789ABCDEF")));
        assert_ne!(hash, machine_id("1123456789abcdef0123456789abcdef"));
        for none in ["", "\n", "uninitialized\n", "0123", "g123456789abcdef0123456789abcdef"] {
            assert_eq!(machine_id(none), "");
        }
    }
}
