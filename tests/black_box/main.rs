//! Black-box tests: the real binary between raw sockets and a strict upstream, one module a promise.
//!
//! One target rather than one a file, because linking is what takes the time. A test knows the proxy
//! by its interface only: nothing here is imported from the crate.

mod support;

mod addresses;
mod admin;
mod authenticate;
mod check;
mod cli;
mod clock;
mod crash;
mod credential_command;
mod credentials;
mod detach;
mod docs;
mod drain;
mod egress;
mod families;
mod faults;
mod forward;
mod guard;
mod http2;
mod https;
mod local;
mod log;
mod normalise;
mod ports;
mod protocol;
mod reload;
mod retry;
mod rotation;
mod run;
mod rust_client;
mod sandbox;
mod secrets;
mod server;
mod settings;
mod soak;
mod stream;
mod systemd;
mod tasks;
mod tasks_command;
mod terminal;
mod timeouts;
mod trust;
mod trusted_files;
mod unix_socket;
mod versions;
mod wait;
mod waiting;
mod warm;
