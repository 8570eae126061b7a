//! `chat-memory health`: one question to the health service, the answer as an exit code.

use std::{
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::{Error, args::HealthArgs, client, exit_code};

/// Prints the server's status. The exit code is 0 only if it serves.
pub async fn run(args: HealthArgs) -> ExitCode {
    exit_code(print(&args, &mut io::stdout()).await.map(|status| {
        if status == ServingStatus::Serving {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }))
}

/// Prints the server's status to `out`, and returns it.
pub async fn print(args: &HealthArgs, out: &mut impl Write) -> Result<ServingStatus, Error> {
    let timeout = Duration::from_secs(args.timeout_seconds);
    let status = match tokio::time::timeout(timeout, check(args)).await {
        Ok(status) => status?,
        Err(_) => {
            return Err(Error::TimedOut {
                target: args.target.target.to_string(),
                seconds: args.timeout_seconds,
            });
        }
    };
    writeln!(out, "{}", status.as_str_name())?;
    Ok(status)
}

async fn check(args: &HealthArgs) -> Result<ServingStatus, Error> {
    let channel = client::connect(&args.target.target).await?;
    let request = HealthCheckRequest {
        service: args.service.clone(),
    };
    let answer = HealthClient::new(channel).check(request).await?;
    Ok(answer.into_inner().status())
}
