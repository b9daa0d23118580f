//! The names of events: what clients may say, and what operators are told. A handler is registered, and an operator is told,
//! by a name from here only, so [`FromAgent::ALL`], [`FromOperator::ALL`] and [`ToOperator::ALL`] are the socket part of the
//! access table.

use borealis_protocol::events::{CONNECT_AGENT, QUICK_JOB_ACCEPTED, QUICK_JOB_DECLINED, QUICK_JOB_PROGRESS, QUICK_JOB_RESULT};

macro_rules! events {
    ($(#[$what:meta])* $set:ident { $($(#[$when:meta])* $event:ident => $name:expr,)* }) => {
        $(#[$what])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $set {
            $($(#[$when])* $event,)*
        }

        impl $set {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$event,)*];

            /// As it is on the wire.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$event => $name,)*
                }
            }
        }
    };
}

events! {
    /// What a machine may say, of itself and its own jobs only.
    FromAgent {
        /// It is there.
        Connect => CONNECT_AGENT,
        /// It could not take a job.
        Declined => QUICK_JOB_DECLINED,
        /// It has a job.
        Accepted => QUICK_JOB_ACCEPTED,
        /// A job runs.
        Progress => QUICK_JOB_PROGRESS,
        /// A job has ended.
        Result => QUICK_JOB_RESULT,
    }
}

events! {
    /// What a person may say, of themselves only.
    FromOperator {
        /// The page somebody looks at.
        PresenceSync => "operator_presence_sync",
        /// Nobody looks any more.
        PresenceClear => "operator_presence_clear",
    }
}

events! {
    /// What those are told who may see the site it happened in; administrators alone, when in none.
    ToOperator {
        /// A machine came, went or started.
        AgentStatus => "agent_status_changed",
        /// A script on a device.
        DeviceActivity => "device_activity_changed",
        /// A request to be enrolled.
        DeviceApprovals => "device_approvals_changed",
        /// What is installed on a device.
        DeviceInventory => "device_inventory_changed",
        /// The services of a device.
        DeviceServices => "device_services_changed",
        /// Which operators are there.
        OperatorPresence => "server_operator_presence_changed",
    }
}
