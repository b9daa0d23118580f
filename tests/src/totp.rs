//! The authenticator app of the tests' operators.

use std::time::{SystemTime, UNIX_EPOCH};

use totp_rs::{Builder, Secret};

/// The length of a TOTP step, in seconds.
pub const STEP_S: u64 = 30;

/// The code for a base32 secret, `steps` steps from now. The engine takes each step of a user once, and one step ahead.
#[must_use]
pub fn code(secret: &str, steps: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_secs();
    let secret = Secret::try_from_base32(secret).expect("a base32 secret");
    Builder::new().with_secret(secret).build_noncompliant().generate(now + steps * STEP_S).to_string()
}
