//! The real program on an embedded file whose disk is full, or fails, for a while.

#![cfg(target_os = "linux")]

mod harness;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use harness::{
    disk::{SmallDisk, limit_files},
    program::Program,
    server::{all_messages, append, client, reason, tcp_channel, user},
    wait,
};
use tokio::{task::JoinHandle, time::sleep};
use tokio_util::sync::CancellationToken;

/// Callers with a session each, who ask for each message again until it is stored, and what they were
/// told in place of an answer.
struct Insistent {
    stop: CancellationToken,
    /// How many messages are stored, and the reasons of refusals.
    told: Arc<Mutex<(usize, Vec<String>)>>,
    callers: Vec<JoinHandle<usize>>,
}

impl Insistent {
    async fn start(program: &Program) -> Self {
        let stop = CancellationToken::new();
        let told = Arc::<Mutex<(usize, Vec<String>)>>::default();
        let channel = tcp_channel(&program.addresses[0]).await;
        let callers = (0..8).map(|caller| {
            let (stop, told) = (stop.clone(), Arc::clone(&told));
            let mut client = client(channel.clone());
            tokio::spawn(async move {
                let mut number = 0;
                loop {
                    let mut request = append(&caller.to_string(), vec![user(&number.to_string())]);
                    request.request_id = format!("request-{number:022}");
                    match client.append(request).await {
                        Ok(_) => {
                            number += 1;
                            told.lock().unwrap().0 += 1;
                            // Only here: what was refused may be stored.
                            if stop.is_cancelled() {
                                return number;
                            }
                        }
                        Err(status) => {
                            told.lock().unwrap().1.push(reason(&status));
                            sleep(Duration::from_millis(20)).await;
                        }
                    }
                }
            })
        });
        let callers = callers.collect();
        Self {
            stop,
            told,
            callers,
        }
    }

    async fn until_stored(&self, more: usize) {
        let stored = || self.told.lock().unwrap().0;
        let enough = stored() + more;
        wait::until("messages are stored", async || {
            (stored() >= enough).then_some(())
        })
        .await;
    }

    /// Until each of them may have been refused twice.
    async fn until_refused(&self) {
        wait::until("messages are refused", async || {
            (self.told.lock().unwrap().1.len() >= 16).then_some(())
        })
        .await;
    }

    /// How many messages each has stored, and the reasons of all refusals.
    async fn end(self) -> (Vec<usize>, Vec<String>) {
        self.stop.cancel();
        let mut stored = Vec::new();
        for caller in self.callers {
            stored.push(caller.await.unwrap());
        }
        let refusals = std::mem::take(&mut self.told.lock().unwrap().1);
        (stored, refusals)
    }
}

/// Each session holds what was acknowledged, each message once and in order.
async fn assert_stored(program: &Program, stored: &[usize]) {
    let mut client = client(tcp_channel(&program.addresses[0]).await);
    for (caller, count) in stored.iter().enumerate() {
        let messages = all_messages(&mut client, &caller.to_string()).await;
        let texts: Vec<_> = messages
            .into_iter()
            .map(|message| message.content)
            .collect();
        let expected: Vec<_> = (0..*count).map(|number| number.to_string()).collect();
        assert_eq!(texts, expected, "session {caller}");
    }
}

#[tokio::test]
async fn appends_are_refused_while_the_disk_is_full_and_stored_once_when_there_is_room() {
    let Some(disk) = SmallDisk::mount("8m") else {
        println!("skipped: this user may not mount a file system");
        return;
    };
    let database = disk.path().join("chat.db");
    let program = Program::embedded(&database);
    let callers = Insistent::start(&program).await;
    callers.until_stored(100).await;
    let filler = disk.fill();
    callers.until_refused().await;
    drop(filler);
    callers.until_stored(100).await;
    let (stored, refusals) = callers.end().await;
    assert!(
        refusals.iter().all(|reason| reason == "STORE_FULL"),
        "{refusals:?}"
    );
    assert_stored(&program, &stored).await;
    program.crash();
    assert_stored(&Program::embedded(&database), &stored).await;
}

#[tokio::test]
async fn appends_are_stored_once_although_the_disk_fails_for_a_while() {
    let directory = tempfile::tempdir().unwrap();
    let database = directory.path().join("chat.db");
    let program = Program::embedded(&database);
    let callers = Insistent::start(&program).await;
    callers.until_stored(100).await;
    limit_files(program.id(), Some(64 << 10));
    callers.until_refused().await;
    limit_files(program.id(), None);
    callers.until_stored(100).await;
    let (stored, refusals) = callers.end().await;
    let reasons = ["OUTCOME_UNKNOWN", "STORE_UNAVAILABLE"];
    assert!(
        refusals
            .iter()
            .all(|reason| reasons.contains(&reason.as_str())),
        "{refusals:?}"
    );
    assert_stored(&program, &stored).await;
    program.crash();
    assert_stored(&Program::embedded(&database), &stored).await;
}
