#include "parallel/socket.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <memory>
#include <system_error>
#include <thread>
#include <utility>

#include "core/check.h"

namespace longspan {
namespace {

constexpr uint32_t kMessage = 0x4c53504d;  // "LSPM"; whoever else calls does not begin so
constexpr uint32_t kFailure = 0x4c535046;
constexpr uint64_t kMostBytes = uint64_t{1} << 34;
constexpr uint64_t kMostFailureBytes = 1 << 16;

std::string error_text() { return std::generic_category().message(errno); }

void set_option(int fd, int level, int option, int value) {
  setsockopt(fd, level, option, &value, sizeof(value));  // a system without it is merely slower
}

/// The addresses of a name, as getaddrinfo has them.
std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> resolve(const std::string& address, int port,
                                                           int flags) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags;
  addrinfo* found = nullptr;
  const std::string service = std::to_string(port);
  const int error =
      getaddrinfo(address.empty() ? nullptr : address.c_str(), service.c_str(), &hints, &found);
  require<ParallelError>(error == 0, "MASTER_ADDR: expected the name of a machine, got \"", address,
                         "\" (", gai_strerror(error), ")");
  return {found, freeaddrinfo};
}

}  // namespace

struct Socket::Header {
  uint32_t kind = kMessage;
  uint32_t reserved = 0;
  uint64_t bytes = 0;
};

Socket::Socket(int fd, std::string peer) : fd_(fd), peer_(std::move(peer)) {
  set_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  set_option(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  set_option(fd, IPPROTO_TCP, TCP_KEEPIDLE, 10);  // seconds
  set_option(fd, IPPROTO_TCP, TCP_KEEPINTVL, 5);
  set_option(fd, IPPROTO_TCP, TCP_KEEPCNT, 4);
  set_option(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 30000);  // milliseconds
}

Socket::~Socket() { close(); }

Socket::Socket(Socket&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), peer_(std::move(other.peer_)) {}

Socket& Socket::operator=(Socket&& other) noexcept {
  close();
  fd_ = std::exchange(other.fd_, -1);
  peer_ = std::move(other.peer_);
  return *this;
}

void Socket::give_up_after(int timeout_ms) const {
  const timeval time = {timeout_ms / 1000, int64_t{timeout_ms % 1000} * 1000};
  setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof(time));
}

void Socket::close() {
  if (fd_ >= 0) ::close(std::exchange(fd_, -1));
}

void Socket::lost(const char* what) const {
  throw ParallelError(message(peer_, ": expected a living process, got: ", what));
}

void Socket::send_all(std::span<const std::byte> bytes) const {
  while (!bytes.empty()) {
    const ssize_t sent = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) {
      // What it said before it went tells more than that it did.
      check();
      lost(error_text().c_str());
    }
    bytes = bytes.subspan(static_cast<size_t>(sent));
  }
}

void Socket::receive_all(std::span<std::byte> out) const {
  while (!out.empty()) {
    const ssize_t got = recv(fd_, out.data(), out.size(), 0);
    if (got < 0 && errno == EINTR) continue;
    if (got == 0) lost("the end of its connection");
    if (got < 0 && errno == EAGAIN) lost("no answer in time");
    if (got < 0) lost(error_text().c_str());
    out = out.subspan(static_cast<size_t>(got));
  }
}

void Socket::send(std::span<const std::byte> bytes) const {
  const Header header = {kMessage, 0, bytes.size()};
  send_all(std::as_bytes(std::span(&header, 1)));
  send_all(bytes);
}

void Socket::send_failure(const std::string& why) const noexcept {
  if (fd_ < 0) return;
  try {
    const auto text = std::as_bytes(std::span(why)).first(std::min<size_t>(why.size(), 4096));
    const Header header = {kFailure, 0, text.size()};
    send_all(std::as_bytes(std::span(&header, 1)));
    send_all(text);
  } catch (...) {  // on purpose: it is gone, and needs no telling
  }
}

Socket::Header Socket::receive_header() const {
  Header header;
  receive_all(std::as_writable_bytes(std::span(&header, 1)));
  if (header.kind == kFailure && header.bytes <= kMostFailureBytes) {
    std::string why(header.bytes, ' ');
    receive_all(std::as_writable_bytes(std::span(why)));
    throw ParallelError(why);
  }
  require<ParallelError>(header.kind == kMessage && header.bytes <= kMostBytes, peer_,
                         ": expected a message of this version of longspan");
  return header;
}

std::vector<std::byte> Socket::receive() const {
  std::vector<std::byte> bytes(receive_header().bytes);
  receive_all(bytes);
  return bytes;
}

void Socket::receive(std::span<std::byte> out) const {
  const Header header = receive_header();
  require<ParallelError>(header.bytes == out.size(), peer_, ": expected ", out.size(),
                         " bytes, got ", header.bytes,
                         "; all ranks must have the same model and options");
  receive_all(out);
}

void Socket::check() const {
  Header header;
  const ssize_t got = recv(fd_, &header, sizeof(header), MSG_PEEK | MSG_DONTWAIT);
  if (got == 0) lost("the end of its connection");
  if (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) {
    lost(error_text().c_str());
  }
  if (got == static_cast<ssize_t>(sizeof(header)) && header.kind == kFailure) receive_header();
}

Listener::Listener(const std::string& address, int port) {
  std::string why;
  // The name may be that of a router in front of this machine.
  for (const std::string& where : {address, std::string()}) {
    const auto found = resolve(where, port, AI_PASSIVE);
    for (const addrinfo* a = found.get(); a != nullptr && fd_ < 0; a = a->ai_next) {
      const int fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
      if (fd < 0) continue;
      set_option(fd, SOL_SOCKET, SO_REUSEADDR, 1);
      if (bind(fd, a->ai_addr, a->ai_addrlen) == 0 && listen(fd, SOMAXCONN) == 0) {
        fd_ = fd;
      } else {
        why = error_text();
        const bool elsewhere = errno == EADDRNOTAVAIL;
        ::close(fd);
        require<ParallelError>(elsewhere, "rank 0: expected port ", port, " of ", address,
                               " to be free, got: ", why, "; LONGSPAN_PORT names another");
      }
    }
    if (fd_ >= 0) return;
  }
  throw ParallelError(
      message("rank 0: expected to listen at ", address, ":", port, ", got: ", why));
}

Listener::~Listener() {
  if (fd_ >= 0) ::close(fd_);
}

int Listener::accept(int timeout_ms) const {
  pollfd waiting = {fd_, POLLIN, 0};
  if (poll(&waiting, 1, timeout_ms) <= 0) return -1;
  return accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC);
}

int connect_to(const std::string& address, int port, int timeout_ms) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  std::string why;
  do {
    const auto found = resolve(address, port, 0);
    for (const addrinfo* a = found.get(); a != nullptr; a = a->ai_next) {
      const int fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
      if (fd < 0) continue;
      if (connect(fd, a->ai_addr, a->ai_addrlen) == 0) return fd;
      why = error_text();
      ::close(fd);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  } while (std::chrono::steady_clock::now() < end);
  throw ParallelError(message("rank 0: expected it at ", address, ":", port, " within ",
                              timeout_ms / 1000, " s, got: ", why));
}

}  // namespace longspan
