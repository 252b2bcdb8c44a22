//! The plain listener for tools that cannot show a Karez key: health checks and reflection, nothing else.
use crate::{
    config::{self, Config},
    daemon::DaemonError,
    mind::Shared,
};
use karez_proto::control::control_server::ControlServer;
use std::{fs, net::SocketAddr, path::Path, sync::Arc, time::Duration};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Identity, Server, ServerTlsConfig};

/// Idle tools are disconnected after so long without a sign of life.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// The certificate, when one is configured.
pub(crate) fn identity(config: &Config, dir: &Path) -> Result<Option<Identity>, DaemonError> {
    let config::Monitor {
        certificate: Some(certificate),
        key: Some(key),
        ..
    } = &config.monitor
    else {
        return Ok(None);
    };
    let read = |path: &Path, setting| {
        let path = dir.join(path);
        fs::read(&path).map_err(|error| DaemonError::File { path, setting, error })
    };
    Ok(Some(Identity::from_pem(
        read(certificate, "monitor.certificate")?,
        read(key, "monitor.key")?,
    )))
}

/// Serves until the daemon stops.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    listener: TcpListener,
    identity: Option<Identity>,
) -> Result<(), DaemonError> {
    let addr = listener
        .local_addr()
        .unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0)));
    let failed = |why: String| DaemonError::Serve {
        what: "monitor",
        addr,
        why,
    };
    let (health, health_service) = tonic_health::server::health_reporter();
    health
        .set_serving::<ControlServer<crate::service::Service>>()
        .await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(karez_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let v1 = reflection().build_v1().map_err(|e| failed(e.to_string()))?;
    let v1alpha = reflection().build_v1alpha().map_err(|e| failed(e.to_string()))?;
    let mut server = Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE / 2))
        .max_concurrent_streams(Some(32))
        .concurrency_limit_per_connection(32);
    if let Some(identity) = identity {
        server = server
            .tls_config(ServerTlsConfig::new().identity(identity))
            .map_err(|e| failed(format!("monitor.certificate and monitor.key do not fit: {e}")))?;
    }
    server
        .add_service(health_service)
        .add_service(v1)
        .add_service(v1alpha)
        .serve_with_incoming_shutdown(
            TcpListenerStream::new(listener),
            async move { shared.stopped().await },
        )
        .await
        .map_err(|e| failed(e.to_string()))
}
