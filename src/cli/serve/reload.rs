//! Applies changes to a running proxy: changes of secret files within seconds, and changes of all
//! settings on SIGHUP. Wrong settings and wrong files are logged, and the old ones stay in use. The
//! exception is a client token file that is empty or stays wrong: it revokes all its tokens.

use std::future;
use std::io;
use std::mem;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::signal::unix::Signal;
use tokio::time::{Instant, sleep_until};

use super::client_tokens::{ClientTokensFile, Decision};
use super::configuration::Configuration;
use super::half_pair::{HalfPair, ReadReason, ticks};
use super::set_up::{client_tokens, rules, warn_of_clients};
use super::systemd::SdNotify;
use crate::auth::client_token::ClientTokens;
use crate::auth::credentials;
use crate::cli::{Failure, runtime};
use crate::error::chain;
use crate::layer::guard::rules::Rules;
use crate::lifecycle::Phase;
use crate::server::Certificate;
use crate::settings::{LiveSettings, SettingRow, Settings};
use crate::stack::Shared;

/// Shortest time after a run of `credentials.command` until a refusal by upstream may cause another run.
const RARELY: Duration = Duration::from_mins(1);

/// Keeps a running proxy up to date.
pub(super) struct Reload {
    pub(super) configuration: Configuration,
    pub(super) shared: Shared,
    /// Certificate for HTTPS; `None` for plain HTTP.
    pub(super) certificate: Option<Arc<Certificate>>,
    /// True if other machines can connect to the proxy.
    pub(super) exposed: bool,
    /// The service manager, which is notified of each reload.
    pub(super) sd_notify: Arc<SdNotify>,
    /// Time of the last run of `credentials.command` by a reload.
    pub(super) ran: Option<Instant>,
    /// A pair that waits, because only one half of it is new.
    pub(super) half_new: HalfPair,
    /// State of the client token file between two reads.
    pub(super) client_tokens_file: ClientTokensFile,
}

/// A problem with a changed file, and its consequence, as texts for the log.
#[derive(PartialEq, Eq)]
struct ReloadProblem {
    text: String,
    outcome: &'static str,
}

/// The last problem that was logged. It is not logged again until it changes.
#[derive(Default)]
struct Warning(Option<ReloadProblem>);

// === impl Reload ===

impl Reload {
    /// Starts a thread that applies changes until the process ends. It is separate, so that a file on a
    /// network that hangs blocks nothing else. Without `hang_up`, settings stay as they are.
    pub(super) fn start(self, hang_up: Option<Signal>) -> io::Result<()> {
        let runtime = runtime()?;
        let thread = thread::Builder::new().name("reload".to_owned());
        thread.spawn(move || runtime.block_on(self.run(hang_up)))?;
        Ok(())
    }

    async fn run(mut self, mut hang_up: Option<Signal>) {
        let [mut credential, mut clients, mut certificate] = <[Warning; 3]>::default();
        let mut ticks = ticks();
        loop {
            let next_read = self.client_tokens_file.next_read(Instant::now());
            let look = tokio::select! {
                _ = ticks.tick() => ReadReason::Regular,
                () = self.shared.tokens.refused() => {
                    credential.tell("credential", self.credential(ReadReason::Refused).await.map_err(kept));
                    continue;
                }
                () = until(next_read) => {
                    clients.tell("client tokens", self.clients());
                    continue;
                }
                Some(()) = next(hang_up.as_mut()) => {
                    if self.is_ready() {
                        self.sd_notify.reloading();
                    }
                    // The sender of the signal expects log lines, even if the problems are the same as
                    // before.
                    [credential, clients, certificate] = Default::default();
                    match self.settings() {
                        Ok(()) => tracing::info!("settings reloaded"),
                        Err(problem) => tracing::warn!(
                            problem,
                            "settings are wrong: keeping the old ones"
                        ),
                    }
                    ReadReason::HangUp
                }
            };
            credential.tell("credential", self.credential(look).await.map_err(kept));
            clients.tell("client tokens", self.clients());
            certificate.tell("certificate", self.certificate().map_err(kept));
            match look {
                ReadReason::HangUp if self.is_ready() => self.sd_notify.ready(),
                ReadReason::Regular => ticks.reset(),
                ReadReason::HangUp | ReadReason::Refused => {}
            }
        }
    }

    /// Returns true if the service manager is to be notified of a reload. After the shutdown has begun it
    /// is not, so that its state of the proxy remains "stopping".
    fn is_ready(&self) -> bool {
        self.shared.lifecycle.phase() == Phase::Ready
    }

    /// Reads all settings again and applies those that can change. On an error, nothing changes.
    fn settings(&mut self) -> Result<(), String> {
        let Configuration {
            args, environment, ..
        } = &self.configuration;
        let (settings, rows) = args.load(environment).map_err(|failure| told(&failure))?;
        let protected = |settings: &Settings| settings.access.client_tokens_file.is_some();
        if self.exposed && protected(&self.configuration.settings) && !protected(&settings) {
            let reason =
                "access.client_tokens_file cannot be taken away while other machines can connect";
            return Err(reason.to_owned());
        }
        let running = &self.configuration.settings.access.client_tokens_file;
        let client_tokens = if settings.access.client_tokens_file == *running {
            // New content of the same file takes effect later, once it has settled.
            self.shared.rules.load().client_tokens.clone()
        } else {
            let tokens = client_tokens(&settings, &self.shared.clock);
            let tokens = tokens.map_err(|failure| told(&failure))?;
            self.client_tokens_file = ClientTokensFile::default();
            tokens
        };
        for SettingRow { key, is_live, .. } in changed(&self.configuration.rows, &rows) {
            if *is_live {
                tracing::info!(key, "setting changed");
            } else {
                tracing::warn!(key, "setting changed; it takes effect at the next start");
            }
        }
        self.apply(settings.live(), client_tokens);
        self.configuration.rows = rows;
        let running = mem::replace(&mut self.configuration.settings, settings);
        // The listeners that are open still have these settings.
        self.configuration.settings.listen = running.listen;
        Ok(())
    }

    /// Applies settings and client tokens to the running proxy.
    fn apply(&self, live: LiveSettings<'_>, client_tokens: Option<Arc<ClientTokens>>) {
        let LiveSettings {
            credentials: _, // the credential is looked up again after each reload
            token,
            access,
            request_body,
            in_flight,
            retry,
            replay,
            errors,
            filter,
        } = live;
        let rules = rules(access, request_body, in_flight, client_tokens);
        self.shared.admin_rules.store(rules.for_admin());
        self.shared.rules.store(rules);
        self.shared.errors.store(errors);
        self.shared.retry_policy.set_limits(retry);
        self.shared.replay_budget.set_limits(replay);
        self.shared.tokens.set_validity(token);
        self.configuration.filter.set(filter.clone());
    }

    /// Looks for the credential again, since it may come from a file that has changed. Runs
    /// `credentials.command` on SIGHUP and after a refusal by upstream, but not for each of many refusals
    /// ([`RARELY`]).
    async fn credential(&mut self, look: ReadReason) -> Result<(), String> {
        if self.configuration.sandboxed {
            return Ok(());
        }
        let asked = match look {
            ReadReason::Regular => false,
            ReadReason::HangUp => true,
            ReadReason::Refused => self.ran.is_none_or(|ran| ran.elapsed() >= RARELY),
        };
        let places = self.configuration.places();
        let (found, whole) = match (places.find(), places.command()) {
            (Err(credentials::Error::Missing), Some(_)) if !asked => return Ok(()),
            (Err(credentials::Error::Missing), Some(command)) => {
                self.ran = Some(Instant::now());
                (command.run().await, true)
            }
            (found, _) => (found, false),
        };
        let found = found.map_err(|error| chain(&error))?;
        if whole || !self.shared.tokens.is_half_of(&found.credential) {
            self.half_new.forget();
        } else if self.half_new.waits(&found.credential, look) {
            return Ok(());
        }
        if self.shared.tokens.replace(found.credential) {
            tracing::info!(source = found.source, "credential changed");
            for warning in found.warnings {
                tracing::warn!("{warning}");
            }
        }
        Ok(())
    }

    /// Reads the client token file again, and accepts new tokens once they have settled.
    fn clients(&mut self) -> Result<(), ReloadProblem> {
        let path = &self.configuration.settings.access.client_tokens_file;
        let in_force = self.shared.rules.load().client_tokens.clone();
        let metrics = &self.shared.metrics;
        let (Some(path), Some(in_force)) = (path, in_force) else {
            metrics.client_tokens_valid(true);
            return Ok(());
        };
        let read = ClientTokens::read(path, Arc::clone(&self.shared.clock));
        let decision = self
            .client_tokens_file
            .judge(read, &in_force, Instant::now());
        match decision {
            Decision::Wait => Ok(()),
            Decision::Keep => {
                metrics.client_tokens_valid(true);
                Ok(())
            }
            Decision::Take(tokens) => {
                metrics.client_tokens_valid(true);
                tracing::info!("client tokens changed");
                self.admit(tokens);
                Ok(())
            }
            Decision::Wrong(problem) => {
                metrics.client_tokens_valid(false);
                Err(kept(problem))
            }
            Decision::Close(text) => {
                metrics.client_tokens_valid(false);
                if !in_force.is_none() {
                    let none = ClientTokens::none(Arc::clone(&self.shared.clock));
                    self.admit(Arc::new(none));
                }
                Err(ReloadProblem {
                    text,
                    outcome: "none is accepted",
                })
            }
        }
    }

    /// Accepts these client tokens from now on, and no others.
    fn admit(&self, tokens: Arc<ClientTokens>) {
        let rules = Rules {
            client_tokens: Some(tokens),
            ..Rules::clone(&self.shared.rules.load())
        };
        warn_of_clients(&rules);
        self.shared.rules.store(rules);
    }

    /// Reads the certificate and its key again, since certificates are renewed.
    fn certificate(&self) -> Result<(), String> {
        let Some(certificate) = &self.certificate else {
            return Ok(());
        };
        if certificate.reload().map_err(|error| chain(&error))? {
            tracing::info!("certificate changed");
        }
        Ok(())
    }
}

// === impl Warning ===

impl Warning {
    fn tell(&mut self, what: &str, outcome: Result<(), ReloadProblem>) {
        let problem = outcome.err();
        if let Some(problem) = &problem
            && self.0.as_ref() != Some(problem)
        {
            tracing::warn!(problem = problem.text, "{what}: {}", problem.outcome);
        }
        self.0 = problem;
    }
}

/// Waits for the next signal. Returns `None` if no signal can come.
async fn next(signal: Option<&mut Signal>) -> Option<()> {
    signal?.recv().await
}

/// Creates a problem with the consequence that nothing changes.
fn kept(text: String) -> ReloadProblem {
    ReloadProblem {
        text,
        outcome: "keeping what there is",
    }
}

/// Waits until this time; forever if it is `None`.
async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => future::pending().await,
    }
}

/// Joins all problems into one line for the log.
fn told(failure: &Failure) -> String {
    failure.lines.join("; ")
}

/// Returns the rows whose value has changed.
fn changed<'a>(
    before: &[SettingRow],
    after: &'a [SettingRow],
) -> impl Iterator<Item = &'a SettingRow> {
    let is_same = |old: &SettingRow, new: &SettingRow| old.key == new.key && old.value == new.value;
    let is_old = move |new: &SettingRow| before.iter().any(|old| is_same(old, new));
    after.iter().filter(move |row| !is_old(row))
}
