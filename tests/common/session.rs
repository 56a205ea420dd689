//! A BoxLite runtime that runs commands one by one.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::TestHome;
use super::wheel::Conversation;

/// A runtime that holds the home's lock until the value is dropped.
pub struct Session(Conversation);

impl Session {
    /// Starts BoxLite and waits until it holds the home's lock.
    pub fn start(home: &TestHome) -> Session {
        let mut session = Session(Conversation::begin(home.root()));
        session.begin();
        session
    }

    /// Starts BoxLite and has its runtime take the home's lock, trying once as every program does.
    pub fn start_once(home: &TestHome) -> Result<Session, String> {
        let mut session = Session(Conversation::begin(home.root()));
        session.ask(&["start"])?;
        Ok(session)
    }

    /// Starts BoxLite's runtime. A mount that merges in the background holds the lock for some
    /// milliseconds, during which the runtime refuses to start. So retry, as a user would.
    fn begin(&mut self) {
        let deadline = Instant::now() + super::PATIENCE;
        while let Err(refusal) = self.ask(&["start"]) {
            let is_held = refusal.contains("Another BoxliteRuntime");
            assert!(is_held && Instant::now() < deadline, "BoxLite: {refusal}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs a command that BoxLite may refuse; the error is its message.
    pub fn ask(&mut self, command: &[&str]) -> Result<Value, String> {
        self.0.say(command);
        let answer = self.0.answer();
        let answer = answer.unwrap_or_else(|| panic!("BoxLite ended: {command:?}"));
        match answer.get("error") {
            Some(error) => Err(error.to_string()),
            None => Ok(answer),
        }
    }

    /// Runs a command that must succeed.
    pub fn must(&mut self, command: &[&str]) -> Value {
        self.ask(command)
            .unwrap_or_else(|refusal| panic!("BoxLite: {command:?}: {refusal}"))
    }
}
