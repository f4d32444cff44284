#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace longspan {

/// A TCP connection that carries messages. Every failure is a ParallelError that begins with the
/// name of the peer; one that has silently gone is found out after half a minute.
class Socket {
 public:
  Socket() = default;
  Socket(int fd, std::string peer);
  ~Socket();
  Socket(Socket&& other) noexcept;
  Socket& operator=(Socket&& other) noexcept;

  void send(std::span<const std::byte> message) const;
  /// The other side's receive() throws `why`. Throws nothing itself.
  void send_failure(const std::string& why) const noexcept;
  /// The next message, of at most kMostBytes.
  std::vector<std::byte> receive() const;
  /// The next message, which must be as long as `out`.
  void receive(std::span<std::byte> out) const;
  /// Throws where the peer is gone or has sent a failure; never waits.
  void check() const;
  /// From now on, receive() throws where nothing comes for so long.
  void give_up_after(int timeout_ms) const;
  void close();
  bool is_open() const { return fd_ >= 0; }
  void rename(std::string peer) { peer_ = std::move(peer); }

 private:
  struct Header;
  Header receive_header() const;
  void send_all(std::span<const std::byte> bytes) const;
  void receive_all(std::span<std::byte> out) const;
  [[noreturn]] void lost(const char* what) const;

  int fd_ = -1;
  std::string peer_;
};

/// Listens at an address of this machine, or at all of them where it has none of that name.
/// Throws ParallelError.
class Listener {
 public:
  Listener(const std::string& address, int port);
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;
  /// The next connection; -1 after timeout_ms.
  int accept(int timeout_ms) const;

 private:
  int fd_ = -1;
};

/// Connects, trying again until the time is over. Throws ParallelError.
int connect_to(const std::string& address, int port, int timeout_ms);

}  // namespace longspan
